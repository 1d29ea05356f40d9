"""Rows -> results on a Ray cluster; imported only when it is asked for.

Rows enter, records of results leave in the order in which they are ready; writing them is left to `result_file.py`,
one machine to `local_run.py`. Ray Data reads rows in tasks of one processor each, on every node, and hands them to
actors that hold the model; it keeps the amount that waits between the two bounded.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from .engines import EngineSettings
from .input_rows import BulkRow
from .local_run import Result, answer, failure
from .row_reader import FailedRow, RowReader, use_one_thread
from .token_batches import token_batches

# Ray Data schedules blocks; a task reads this many rows one after the other.
_ROWS_PER_BLOCK = 8
_PAYLOAD = "payload"


def run_on_ray(
    rows: Iterable[BulkRow],
    reader: RowReader,
    settings: EngineSettings,
    *,
    address: str,
    num_actors: int | None,
    max_batch_tokens: int,
    max_batch_rows: int,
) -> Generator[Result, None, None]:
    """Answers rows.

    Args:
        rows: all that are to be done; their media must be readable on every node.
        reader: of the same checkpoint as `settings`.
        settings: of the engine that each actor builds.
        address: of a cluster, "auto", or "local" for one on this machine that ends with the run.
        num_actors: models; by default one per GPU, or one.
        max_batch_tokens: see `token_batches`.
        max_batch_rows: likewise; an actor takes so many rows at a time.

    Yields:
        One record per row, in any order.

    Raises:
        ImportError: where Ray is not installed.
        ValueError: where actors would leave no processor to read with.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("Expected Ray for --ray, found none: pip install 'videollama3[ray]'.") from error
    # A run needs no web server of its own.
    own = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **own)
    try:
        results = _pipeline(list(rows), reader, settings, num_actors, max_batch_tokens, max_batch_rows)
        for row in results.iter_rows():
            yield pickle.loads(row[_PAYLOAD])
    finally:
        ray.shutdown()


def _pipeline(
    rows: list[BulkRow],
    reader: RowReader,
    settings: EngineSettings,
    num_actors: int | None,
    max_batch_tokens: int,
    max_batch_rows: int,
) -> Any:
    import ray.data

    num_actors, num_gpus = _plan_actors(ray.cluster_resources(), num_actors)
    # The command shows its own.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    payloads = [{_PAYLOAD: pickle.dumps(row)} for row in rows]
    blocks = -(-len(payloads) // _ROWS_PER_BLOCK)
    return (
        ray.data.from_items(payloads, override_num_blocks=blocks)
        # As many tasks as blocks is no limit; but without one Ray fuses reading into the actors, and the model waits.
        .map(_reading(reader), num_cpus=1, concurrency=blocks)
        .map_batches(
            Answering,
            # Not the reader itself: its tokenizer is large, and the actor loads one anyway.
            fn_constructor_args=(settings, reader.system_prompt, reader.prune, max_batch_tokens, max_batch_rows),
            batch_size=max_batch_rows,
            batch_format="numpy",
            concurrency=num_actors,
            num_cpus=1,
            num_gpus=num_gpus,
        )
    )


def _plan_actors(resources: dict[str, float], num_actors: int | None) -> tuple[int, int | None]:
    """How many actors, and GPUs of each. One processor at least stays free: else nothing is ever read."""
    processors, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    wanted = num_actors or max(gpus, 1)
    if wanted > processors - 1:
        raise ValueError(
            f"Expected at most {max(processors - 1, 0)} actors on a cluster of {processors} processors, of which each "
            f"takes one and one must stay free for reading, got {wanted}."
        )
    if gpus and wanted > gpus:
        raise ValueError(f"Expected at most one actor for each of {gpus} GPUs, got {wanted}.")
    return wanted, 1 if gpus else None


def _reading(reader: RowReader) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def read(row: dict[str, Any]) -> dict[str, Any]:
        use_one_thread()
        return {_PAYLOAD: pickle.dumps(reader.read(pickle.loads(row[_PAYLOAD])))}

    return read


class Answering:
    """An actor: holds the model and answers rows.

    Args:
        settings: of the engine.
        system_prompt: of the reader of the rows.
        prune: likewise.
        max_tokens: see `token_batches`.
        max_rows: likewise.
    """

    def __init__(
        self, settings: EngineSettings, system_prompt: bool, prune: bool | None, max_tokens: int, max_rows: int
    ) -> None:
        reader = RowReader(settings.load_processor(), system_prompt=system_prompt, prune=prune)
        self._engine = settings.build(reader)
        self._limits = {"max_tokens": max_tokens, "max_rows": max_rows}

    def __call__(self, batch: dict[str, Any]) -> Generator[dict[str, npt.NDArray[np.object_]], None, None]:
        """Yields the results of each group as it is answered."""
        read = (pickle.loads(payload) for payload in batch[_PAYLOAD])
        for group in token_batches(read, **self._limits):
            results = [failure(group)] if isinstance(group, FailedRow) else answer(self._engine, group)
            # As objects: arrays of bytes have one width and lose zeros at the end.
            yield {_PAYLOAD: np.array([pickle.dumps(result) for result in results], dtype=object)}
