"""What a training run left in its folder, for the model card.

A folder enters, a record of known facts leaves; what no file says stays unknown. Only JSON is read:
`training_args.bin` is a pickle, which could run code, and is left alone.

`training_record.json` is an object whose fields are all optional:

    base_model           str     Hub id or folder that the run started from
    recipe               object  hyperparameters, name -> number, string, boolean or null
    data                 list    names of the data sets, Hub ids where they have one
    num_train_samples    int
    num_skipped_samples  int     left out because they could not be read or did not fit
    num_unread_samples   int     not come to, as the run was to end before
    num_updates          int     optimizer steps
    num_epochs           float   passes over the data
    num_processes        int
    mean_train_loss      float   over the run
    final_train_loss     float   the last one logged
    eval                 object  name -> number, or an object of `value` and, all optional, `metric`, `dataset_id`,
                                 `dataset_name`, `task_id` (of a benchmark on the Hub)
    versions             object  package -> version

Other fields are ignored. `trainer_state.json` of transformers' Trainer gives steps, epochs and losses,
`adapter_config.json` of peft the base of an adapter.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

RECORD_FILE = "training_record.json"
STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_config.json"

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "base_model": (str,),
    "recipe": (dict,),
    "data": (list,),
    "num_train_samples": (int,),
    "num_skipped_samples": (int,),
    "num_unread_samples": (int,),
    "num_updates": (int,),
    "num_epochs": (int, float),
    "num_processes": (int,),
    "mean_train_loss": (int, float),
    "final_train_loss": (int, float),
    "eval": (dict,),
    "versions": (dict,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What is known of a training run; None and empty mean that no file says it.

    Attributes:
        base_model: Hub id or folder.
        adapter: whether the folder holds an adapter, not whole weights.
        recipe: hyperparameters.
        data: names of data sets.
        num_train_samples: samples of the training data.
        num_skipped_samples: those left out.
        num_unread_samples: those that the run ended before.
        num_updates: optimizer steps.
        num_processes: that trained together.
        num_epochs: passes over the data.
        mean_train_loss: over the run.
        final_train_loss: the last one logged.
        first_logged_loss: (step, loss).
        scores: evaluation results by name, each with at least `value`.
        versions: package -> version.
    """

    base_model: str | None = None
    adapter: bool = False
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: tuple[str, ...] = ()
    num_train_samples: int | None = None
    num_skipped_samples: int | None = None
    num_unread_samples: int | None = None
    num_updates: int | None = None
    num_processes: int | None = None
    num_epochs: float | None = None
    mean_train_loss: float | None = None
    final_train_loss: float | None = None
    first_logged_loss: tuple[int, float] | None = None
    scores: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def read_training(folder: Path) -> TrainingFacts | None:
    """Reads the files of a training run.

    Args:
        folder: a checkpoint.

    Returns:
        What they say, or None where there are none of them.

    Raises:
        ValueError: for a file that is not what this module documents, naming file and field.
    """
    record = read_json_object(folder / RECORD_FILE)
    state = read_json_object(folder / STATE_FILE)
    adapter = read_json_object(folder / ADAPTER_FILE)
    if record is None and state is None and adapter is None:
        return None
    facts = {**_from_state(state or {}), **_from_record(record or {}, folder / RECORD_FILE)}
    if record is not None and record.get("num_epochs", 0) is None:
        # Of a stream the Trainer says 1, however much of it was read.
        facts.pop("num_epochs", None)
    if adapter is not None:
        facts.setdefault("base_model", adapter.get("base_model_name_or_path"))
    return TrainingFacts(adapter=adapter is not None, **facts)


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file.

    Raises:
        ValueError: for anything else than a JSON object.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected JSON in {path}, got something else: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(content).__name__}.")
    return content


def _from_record(record: dict[str, Any], path: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, types in _FIELD_TYPES.items():
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            expected = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"Expected {name!r} in {path} as {expected}, got {type(value).__name__}: {value!r}.")
        facts[name] = value
    if "data" in facts:
        facts["data"] = tuple(str(name) for name in facts["data"])
    if "eval" in facts:
        facts["scores"] = {name: _score(name, score, path) for name, score in facts.pop("eval").items()}
    return facts


def _score(name: str, score: Any, path: Path) -> dict[str, Any]:
    fields = score if isinstance(score, dict) else {"value": score}
    value = fields.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"Expected a number as the value of eval {name!r} in {path}, got {value!r}.")
    return fields


def _from_state(state: dict[str, Any]) -> dict[str, Any]:
    history = state.get("log_history", ())
    logged = [(entry["step"], entry["loss"]) for entry in history if {"step", "loss"} <= set(entry)]
    means = [entry["train_loss"] for entry in history if "train_loss" in entry]
    facts = {
        "first_logged_loss": logged[0] if logged else None,
        "final_train_loss": logged[-1][1] if logged else None,
        "mean_train_loss": means[-1] if means else None,
        "num_updates": state.get("global_step"),
        "num_epochs": state.get("epoch"),
    }
    return {name: value for name, value in facts.items() if value is not None}
