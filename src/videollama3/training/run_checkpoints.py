"""Checkpoints of a run: which there are, what they remember of it, and whether a run may go on from one.

A recipe and a folder enter; the checkpoint to go on from leaves, or an error that says why not. Writing weights,
optimizer and random states is left to transformers' Trainer.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..conversion.adapter import RUN_SETTINGS_NAME
from ..whole_files import write_whole
from .recipe import Recipe

# In every checkpoint, beside the recipe's settings: a digest of the samples of all updates in their order.
_PLAN_NAME = "sample_order.sha256"
# A run that goes on has these from its checkpoint, whatever its recipe says.
_KEPT = ("rates.", "adapter", "schedule.optimizer", "schedule.weight_decay")
# With others a stream gives other samples; of what has a length the digest tells.
_OF_STREAMS = ("data.", "batch.")

logger = logging.getLogger(__name__)


def checkpoint_to_resume(recipe: Recipe, resume: str | bool) -> str | None:
    """The checkpoint that a run goes on from; None for one that begins.

    Args:
        recipe: of the run.
        resume: a checkpoint folder, or that of a run for its last one; True for the last one in the output folder.

    Raises:
        ValueError: where there is none, where one that begins would find old ones, or where the run that wrote it
            had other settings of what comes from the checkpoint.
    """
    if not resume:
        old = [path.name for path in _checkpoints(recipe.output.folder).values()]
        if old and not recipe.output.overwrite:
            raise ValueError(
                f"Expected an output folder without checkpoints for a run that begins anew, got {', '.join(old)} in "
                f"{recipe.output.folder}, which a later --resume would take for its own: pass --resume to go on from "
                "the last one, choose another output.folder, or pass output.overwrite=true to delete them."
            )
        return None
    place = resume if isinstance(resume, str) else recipe.output.folder
    last = place if resume is not True and _is_complete(Path(place)) else last_checkpoint(place)
    if last is None:
        raise ValueError(
            f"Expected a complete checkpoint to resume from in {place}, got none: start without --resume."
        )
    _compare(recipe, last)
    return last


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run, None without one; what a killed run was just writing is passed over."""
    complete = [path for path in _checkpoints(folder).values() if _is_complete(path)]
    return str(complete[-1]) if complete else None


def delete_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Deletes what Trainer wrote for an earlier run."""
    for path in _checkpoints(folder).values():
        # First, so that one that is deleted in part does not count as complete.
        (path / TRAINER_STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(path)


def updates_of(checkpoint: str | os.PathLike[str]) -> int:
    """Updates that a checkpoint's run had made."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return int(state["global_step"])


def flat_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as `section.key` -> number, text, true or false, or None."""
    settings: dict[str, Any] = {}
    for section, values in dataclasses.asdict(recipe).items():
        if values is None:
            settings[section] = None
        else:
            texts = {key: ", ".join(value) if isinstance(value, tuple) else value for key, value in values.items()}
            settings.update({f"{section}.{key}": value for key, value in texts.items()})
    return settings


def write_settings(recipe: Recipe, folder: str | os.PathLike[str]) -> None:
    """Puts a recipe's settings into a folder."""
    write_whole(Path(folder) / RUN_SETTINGS_NAME, json.dumps(flat_settings(recipe), indent=2) + "\n")


class RunInCheckpoints:
    """What every checkpoint is to say of its run: settings, and which samples come in which order."""

    def __init__(self, recipe: Recipe, plan_digest: str | None) -> None:
        """Keeps what is written.

        Args:
            recipe: of the run.
            plan_digest: changes with samples and their order; None for a stream, which nobody can plan.
        """
        self.recipe, self.plan_digest = recipe, plan_digest

    def warn_of_other_samples(self, checkpoint: str | None) -> None:
        """Where the run that wrote a checkpoint read others, or in another order."""
        if checkpoint is None:
            return
        kept = Path(checkpoint) / _PLAN_NAME
        if self.plan_digest is None:
            different = _differences(self.recipe, checkpoint, _OF_STREAMS)
        elif kept.is_file() and kept.read_text(encoding="utf-8").strip() != self.plan_digest:
            different = ["another max_steps, other data, limits or number of processes"]
        else:
            return
        if different:
            logger.warning(
                "This run reads other samples, or in another order, than the one that wrote %s (%s): some samples "
                "will be seen twice, others not in this epoch.",
                checkpoint,
                ", ".join(different),
            )

    def write(self, checkpoint: str | os.PathLike[str]) -> None:
        """Puts it into a checkpoint, before that counts as complete."""
        write_settings(self.recipe, checkpoint)
        if self.plan_digest is not None:
            write_whole(Path(checkpoint) / _PLAN_NAME, self.plan_digest + "\n")


def _compare(recipe: Recipe, checkpoint: str) -> None:
    different = _differences(recipe, checkpoint, _KEPT)
    if different:
        raise ValueError(
            f"Expected the settings of the run that wrote {checkpoint}, which come from there with the optimizer, got "
            f"{', '.join(different)}: go on with those of before, or begin anew."
        )


def _differences(recipe: Recipe, checkpoint: str, prefixes: tuple[str, ...]) -> list[str]:
    """Settings that differ, as `rates.llm=0.1 instead of 0.001`; none where the checkpoint remembers nothing."""
    path = Path(checkpoint) / RUN_SETTINGS_NAME
    if not path.is_file():
        return []
    before, now = json.loads(path.read_text(encoding="utf-8")), flat_settings(recipe)
    names = [name for name in {**before, **now} if name.startswith(prefixes)]
    return [
        f"{name}={now.get(name)} instead of {before.get(name)}"
        for name in names
        # 0 freezes as None does.
        if (now.get(name) or None) != (before.get(name) or None)
    ]


def _checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Folders that Trainer writes, by their update, in order; a "checkpoint-best" is somebody else's."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir()]
    numbers = {path: path.name.partition("-")[2] for path in paths}
    return dict(sorted((int(number), path) for path, number in numbers.items() if number.isdigit()))


def _is_complete(checkpoint: Path) -> bool:
    """Whether the last file that Trainer writes is there in full; the folder of a finished run has it, too."""
    if not ((checkpoint / "scheduler.pt").is_file() or checkpoint.name.startswith("checkpoint-")):
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
