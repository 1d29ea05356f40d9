r"""One checked row -> token ids, labels and media tensors.

A `TrainingRow` and a processor enter, the tensors of one sample leave. Which tokens are learnt is decided here;
reading media is left to the processor, packing to `packing.py`.

Labels stand at their own position (the model shifts them) and are -100 where nothing is learnt. Learnt are the
words of the assistant with the `<|im_end|>` after them, and in streaming rows what follows each `stream` message:

    <|im_start|> user \n Q <|im_end|> \n <|im_start|> assistant \n A <|im_end|> \n
    -            -    -  - -          -  -            -         -  A <|im_end|> -
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..processing.encoded_prompt import EncodedPrompt
from .dataset_rows import TrainingRow

IGNORED = -100
# Tells this choice from the other that the same seed makes.
_UNPRUNED = 1
Overflow = Literal["raise", "truncate", "skip"]


class SampleTooLongError(ValueError):
    """A sample has more tokens than `max_length`."""


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How rows become samples.

    Attributes:
        max_length: tokens of a sample, counted after pruning.
        overflow: what happens beyond: an error, or a cut on the right that spares whole pictures.
        max_visual_tokens: of a sample, before pruning.
        stream_max_frames: later frames of a streaming row are dropped.
        add_system_prompt: put the released models' system prompt first.
        pixel_dtype: "uint8" (the model normalises) or "float32".
        unpruned_share: of the rows: their videos keep all tokens where others' are pruned.
        processor_options: further options of the processor's call.
    """

    max_length: int = 16384
    overflow: Overflow = "raise"
    max_visual_tokens: int = 10240
    stream_max_frames: int = 400
    add_system_prompt: bool = False
    pixel_dtype: str = "uint8"
    unpruned_share: float = 0.0
    processor_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def build_sample(
    row: TrainingRow, processor: Any, *, options: SampleOptions, seed: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """Prepares one row.

    Args:
        row: from `dataset_rows.read_row`.
        processor: a `VideoLlama3Processor`.
        options: see there.
        seed: of the choice among stream targets, and among rows that are not pruned: the run's, and the row's number.

    Returns:
        `input_ids` and `labels`, int64 (tokens,), and the media tensors that there are.

    Raises:
        SampleTooLongError: for more than `max_length` tokens, unless they may be cut.
        ValueError: for media that cannot be read, and when no token is left to learn.
    """
    prune = None if options.unpruned_share == 0 or is_pruned(options.unpruned_share, seed=seed) else False
    encoded = encode_row(row, processor, options=options, prune=prune)
    num_tokens = len(encoded.prompt.input_ids)
    if num_tokens > options.max_length:
        if options.overflow != "truncate":
            raise SampleTooLongError(
                f"Expected at most max_length={options.max_length} tokens after pruning, got {num_tokens}: lower "
                "max_frames or max_visual_tokens, raise max_length, or choose overflow='truncate' or 'skip'."
            )
        encoded = encoded.truncated(options.max_length)
    labels = supervised_labels(encoded, seed=seed)
    if not (labels != IGNORED).any():
        cut = f" within the first {options.max_length} of {num_tokens} tokens" if num_tokens > len(labels) else ""
        raise ValueError(f"Expected an answer to learn{cut}, got none.")
    return {**encoded.tensors(), "labels": torch.from_numpy(labels)}


def is_pruned(unpruned_share: float, *, seed: tuple[int, int]) -> bool:
    """Whether a row is among those whose videos are pruned; the same in every epoch, as lengths depend on it."""
    return bool(np.random.default_rng([*seed, _UNPRUNED]).random() >= unpruned_share)


def encode_row(
    row: TrainingRow, processor: Any, *, options: SampleOptions, prune: bool | None = None
) -> EncodedPrompt:
    """Tokens and media of a row, without a limit on its length.

    Args:
        row: from `dataset_rows.read_row`.
        processor: a `VideoLlama3Processor`.
        options: see there.
        prune: whether videos are pruned; None: as the processor says.
    """
    shared = {
        **options.processor_options,
        "max_visual_tokens": options.max_visual_tokens,
        "pixel_dtype": options.pixel_dtype,
        "add_system_prompt": options.add_system_prompt,
    }
    if prune is not None:
        shared["use_token_compression"] = prune
    if row.stream is None:
        encoded: EncodedPrompt = processor.encode_conversation(row.messages, **shared)
        return encoded
    streamed: EncodedPrompt = processor.encode_stream(
        row.stream.video,
        row.messages,
        start_time=row.stream.start_time,
        end_time=row.stream.end_time,
        **{**shared, "max_frames": options.stream_max_frames},
    )
    return streamed


def supervised_labels(encoded: EncodedPrompt, *, seed: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The authors' labels of a row.

    Args:
        encoded: tokens with their masks.
        seed: of the choice among stream targets.

    Returns:
        int64 (tokens,): the token's own id where it is learnt, else -100.
    """
    ids = np.array(encoded.prompt.input_ids, dtype=np.int64)
    learnt = np.array(encoded.prompt.assistant_mask, dtype=bool)
    after_stream = np.flatnonzero(encoded.prompt.after_stream_mask)
    learnt[balanced_positions(after_stream, ids[after_stream], seed=seed)] = True
    return np.where(learnt, ids, IGNORED)


def balanced_positions(
    positions: npt.NDArray[np.int64], ids: npt.NDArray[np.int64], *, seed: tuple[int, int]
) -> npt.NDArray[np.int64]:
    """Positions after `stream` messages of which speaking and staying silent occur equally often.

    Of the commoner token, positions are dropped at random down to the count of the rarer. As in the authors'
    code only tokens that occur are counted: where a row is silent (or speaks) throughout, all stay.

    Args:
        positions: of the first token after each `stream` message.
        ids: the tokens there.
        seed: of the choice.

    Returns:
        The kept positions, ascending.
    """
    kinds, counts = np.unique(ids, return_counts=True)
    if len(kinds) < 2:
        return positions
    generator = np.random.default_rng(seed)
    kept = [generator.permutation(positions[ids == kind])[: counts.min()] for kind in kinds]
    return np.sort(np.concatenate(kept))
