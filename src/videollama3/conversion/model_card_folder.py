"""Writes the right card into a checkpoint's folder.

A folder enters; its `README.md`, and files under `.eval_results` for benchmarks on the Hub, leave. What stands in a
card is left to `model_card.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump

from ..modeling.checkpoint_layouts import (
    NATIVE_MODEL_TYPE,
    NATIVE_VISION_MODEL_TYPE,
    OFFICIAL_MODEL_TYPE,
    OFFICIAL_VISION_MODEL_TYPE,
    PLUGIN_MODEL_TYPE,
    PLUGIN_VISION_MODEL_TYPE,
)
from ..whole_files import write_whole
from .model_card import RELEASES, Kind, Layout, release_sizes, render_card
from .model_card_memory import ModelSizes, VisionSizes, sizes_of
from .model_card_training import TrainingFacts, read_json_object, read_training

CARD_FILE = "README.md"
RESULTS_FOLDER = ".eval_results"
_LAYOUTS: dict[str, Layout] = {
    PLUGIN_MODEL_TYPE: "plugin",
    PLUGIN_VISION_MODEL_TYPE: "plugin",
    OFFICIAL_MODEL_TYPE: "official",
    OFFICIAL_VISION_MODEL_TYPE: "official",
    NATIVE_MODEL_TYPE: "native",
    NATIVE_VISION_MODEL_TYPE: "native",
}
_SIGNATURE = re.compile(r"\n<!-- videollama3 card ([0-9a-f]{16}) -->\n\Z")


def write_card(
    folder: str | Path, *, kind: Kind | None = None, name: str | None = None, overwrite: bool = False
) -> list[Path]:
    """Writes the card of a checkpoint.

    Args:
        folder: a checkpoint in any of the three layouts, or an adapter.
        kind: of the card; found out where the folder leaves no doubt.
        name: what the snippets load; the folder's name by default.
        overwrite: replaces a `README.md` that this function did not write, or that was changed since.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: where there is no checkpoint.
        FileExistsError: for a `README.md` of somebody else.
        ValueError: where the kind is in doubt, or contradicts the checkpoint's sizes.
    """
    folder = Path(folder)
    training = read_training(folder)
    config = read_json_object(folder / "config.json")
    if config is None and not (training and training.adapter):
        raise FileNotFoundError(f"Expected a checkpoint with a config.json in {folder}, found none.")
    kind = kind or kind_of(config, training, folder=folder)
    card = folder / CARD_FILE
    before = card.read_text(encoding="utf-8") if card.exists() else ""
    if before and not overwrite and not is_own_card(before):
        raise FileExistsError(
            f"{card} was not written by this command, or was changed since: pass --overwrite to replace it."
        )
    text = _render(folder, config, kind, name or folder.resolve().name, training)
    write_whole(card, signed(text))
    return [card, *_write_results(folder, training)]


def kind_of(config: dict[str, Any] | None, training: TrainingFacts | None, *, folder: Path) -> Kind:
    """The kind of a checkpoint.

    Args:
        config: its `config.json`; None for an adapter.
        training: what a training run left.
        folder: for the error.

    Raises:
        ValueError: where the sizes are those of several releases.
    """
    if training is not None or config is None:
        return "own"
    sizes = sizes_of(config)
    fitting = [kind for kind in RELEASES if release_sizes(kind) == _comparable(sizes, kind)]
    if len(fitting) > 1:
        raise ValueError(
            f"The sizes of {folder} are those of {' and of '.join(fitting)}, and of whatever was trained from them: "
            f"say which it is with --kind ({', '.join(fitting)}, or own for one's own training)."
        )
    return fitting[0] if fitting else "own"


def is_own_card(text: str) -> bool:
    """Whether a card was written by `write_card` and not changed since."""
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == _digest(text[: signature.start()])


def signed(text: str) -> str:
    """The card with a last line by which it is known again."""
    return f"{text}\n<!-- videollama3 card {_digest(text)} -->\n"


def result_files(training: TrainingFacts | None) -> dict[str, str]:
    """`.eval_results` files by name: those scores that name a benchmark on the Hub and its task.

    The published scores are not among them: the Hub takes a `dataset.id` and a `task_id` that a benchmark has
    registered there, and which of theirs are registered was not verified.
    """
    files = {}
    for name, score in (training.scores if training else {}).items():
        if "dataset_id" in score and "task_id" in score:
            entry = {"dataset": {"id": score["dataset_id"], "task_id": score["task_id"]}, "value": score["value"]}
            files[f"{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.yaml"] = yaml_dump([entry], sort_keys=False)
    return files


def _write_results(folder: Path, training: TrainingFacts | None) -> list[Path]:
    written = []
    for name, content in result_files(training).items():
        path = folder / RESULTS_FOLDER / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, content)
        written.append(path)
    return written


def _render(folder: Path, config: dict[str, Any] | None, kind: Kind, name: str, training: TrainingFacts | None) -> str:
    if config is None:
        return render_card(kind, name=name, training=training)
    sizes = sizes_of(config)
    if kind in RELEASES and release_sizes(kind) != _comparable(sizes, kind):
        raise ValueError(f"Expected the sizes of {kind} in {folder}, {release_sizes(kind)}, got {sizes}.")
    return render_card(
        kind,
        name=name,
        layout=_layout(config, folder),
        sizes=sizes,
        max_tokens=_max_tokens(folder),
        training=training,
    )


def _comparable(sizes: ModelSizes | VisionSizes, kind: Kind) -> ModelSizes | VisionSizes:
    """Sizes with the release's vocabulary and tying: converted checkpoints may pad one and untie the other."""
    release = release_sizes(kind)
    if isinstance(sizes, ModelSizes) and isinstance(release, ModelSizes):
        return dataclasses.replace(sizes, vocabulary=release.vocabulary, tied=release.tied)
    return sizes


def _layout(config: dict[str, Any], folder: Path) -> Layout:
    model_type = config.get("model_type")
    if model_type not in _LAYOUTS:
        raise ValueError(f"Expected a model_type out of {', '.join(_LAYOUTS)} in {folder}, got {model_type!r}.")
    return _LAYOUTS[model_type]


def _max_tokens(folder: Path) -> int | None:
    """Visual tokens of a request as the processor's files say it, None where they do not."""
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        content = read_json_object(folder / name) or {}
        value = (content.get(part) or {} if part else content).get("max_tokens")
        if isinstance(value, int):
            return value
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
