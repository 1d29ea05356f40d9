"""The demonstrator's vision encoder learns to see, before there are words: what stands at each visual token.

Pictures and frames of clips that `make_data.py` drew and the checkpoint of `build_model.py` enter; the same checkpoint
with a trained vision encoder leaves. It stands for SigLIP's own training, from which the paper's encoder starts: the
recipes then do what the paper's stages do.

    python -m demonstrator.pretrain_encoder DATA START FOLDER

For each visual token four linear heads, thrown away afterwards, tell kind and colour of the shape that covers it, or
that there is none, where that shape has its centre, and where in the picture the token stands: after pruning the
language model could not count it out. Four tokens of a picture with a red circle on the left:

    kind    circle none     colour  red none    centre  (0.2, 0.5) -    place   (0.25, 0.25) (0.75, 0.25)
            circle none             red none            (0.2, 0.5) -            (0.25, 0.75) (0.75, 0.75)
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import videollama3  # noqa: F401  (registers the classes)
from videollama3.training.muon import MuonWithAdamW, is_muon_parameter

from .make_data import CAPTIONS, CLIPS, PICTURES, rng_of
from .scenes import COLORS, KINDS, Scene, random_clip, random_picture

NONE = 0
# A token belongs to the shape that covers this share of it, or of which it covers this share.
_SHARE_OF_COVER = 0.25
# Most tokens show the background.
_WEIGHT_OF_NONE = 0.2
_WEIGHT_OF_CENTRES = 3.0
# Of a clip that is looked at, its frames being much alike.
_FRAMES_PER_CLIP = 3
_FILES = {CAPTIONS: "captions/{:06d}.png", PICTURES: "pictures/{:06d}.png", CLIPS: "clips/{:06d}.mp4"}


def scene_of(part: int, number: int, *, seed: int) -> Scene:
    """What `make_data.py` drew into a file."""
    rng = rng_of(seed, part, number)
    return random_clip(rng) if part == CLIPS else random_picture(rng, count=1 if part == CAPTIONS else None)


def token_labels(scene: Scene, rows: int, columns: int, *, frame: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands at each visual token.

    Args:
        scene: of a picture or clip.
        rows: of visual tokens.
        columns: of visual tokens.
        frame: index of the frame.

    Returns:
        Kind and colour, int64 (rows * columns, 2): 0 for none, else 1 + index in `KINDS` and in `COLORS`; and the
        centre of that shape, float32 (rows * columns, 2): x and y as shares of the sides, NaN for none.
    """
    labels = torch.zeros(rows, columns, 2, dtype=torch.int64)
    centres = torch.full((rows, columns, 2), math.nan)
    best = torch.zeros(rows, columns)
    height, width = scene.height / rows, scene.width / columns
    for shape in scene.shapes:
        if not shape.first_frame <= frame <= shape.last_frame:
            continue
        (x, y), half = shape.motion.at(frame / scene.rate), shape.size / 2
        for row in range(max(0, int((y - half) // height)), min(rows, math.ceil((y + half) / height))):
            for column in range(max(0, int((x - half) // width)), min(columns, math.ceil((x + half) / width))):
                high = min(y + half, (row + 1) * height) - max(y - half, row * height)
                wide = min(x + half, (column + 1) * width) - max(x - half, column * width)
                share = high * wide / min(height * width, shape.size**2)
                if share >= _SHARE_OF_COVER and share > best[row, column]:
                    best[row, column] = share
                    labels[row, column] = torch.tensor([1 + KINDS.index(shape.kind), 1 + COLORS.index(shape.color)])
                    centres[row, column] = torch.tensor([x / scene.width, y / scene.height])
    return labels.flatten(0, 1), centres.flatten(0, 1)


def token_places(rows: int, columns: int) -> torch.Tensor:
    """Where the centre of each visual token stands: float32 (rows * columns, 2), x and y as shares of the sides."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


@dataclasses.dataclass(frozen=True)
class LabelledPicture:
    """One picture, or several joined into a pack, with what stands at its visual tokens.

    Attributes:
        pixels: uint8 (patches, 588).
        grids: int64 (pictures, 3), as the encoder takes them.
        labels: int64 (tokens, 2) of `token_labels`.
        centres: float32 (tokens, 2) of `token_labels`.
        places: float32 (tokens, 2) of `token_places`.
    """

    pixels: torch.Tensor
    grids: torch.Tensor
    labels: torch.Tensor
    centres: torch.Tensor
    places: torch.Tensor


class LabelledPictures(torch.utils.data.Dataset[list[LabelledPicture]]):
    """Files by number: the one picture of a png file, some frames of an mp4 file."""

    def __init__(self, folder: Path, processor: Any, files: Sequence[tuple[int, int]], *, seed: int) -> None:
        """Names the files.

        Args:
            folder: of `make_data.py`.
            processor: of the checkpoint.
            files: part (CAPTIONS, PICTURES or CLIPS) and number of each.
            seed: that the data was made with.
        """
        self.folder, self.processor, self.files, self.seed = folder, processor, files, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[LabelledPicture]:
        part, number = self.files[index]
        path = str(self.folder / _FILES[part].format(number))
        scene = scene_of(part, number, seed=self.seed)
        if part != CLIPS:
            features = self.processor.image_processor([path], pixel_dtype="uint8", return_tensors="pt")
            merge = int(features["image_merge_sizes"][0])
            return [_labelled(features["pixel_values"], features["image_grid_thw"][0], merge, scene, 0)]
        features = self.processor.video_processor([path], pixel_dtype="uint8", return_tensors="pt")
        grid, merge = features["video_grid_thw"][0], int(features["video_merge_sizes"][0])
        frames = scene.sampled_frames()
        if len(frames) != int(grid[0]):
            raise ValueError(
                f"Expected {path} to be read as the {len(frames)} frames of its scene, got {int(grid[0])}."
            )
        ways = rng_of(self.seed, part, number).permutation(len(frames))[:_FRAMES_PER_CLIP]
        pixels = features["pixel_values_videos"].unflatten(0, (len(frames), -1))
        one = torch.tensor([1, int(grid[1]), int(grid[2])])
        return [_labelled(pixels[i], one, merge, scene, frames[i]) for i in ways]


def _labelled(pixels: torch.Tensor, grid: torch.Tensor, merge: int, scene: Scene, frame: int) -> LabelledPicture:
    rows, columns = int(grid[1]) // merge, int(grid[2]) // merge
    labels, centres = token_labels(scene, rows, columns, frame=frame)
    return LabelledPicture(pixels, grid[None], labels, centres, token_places(rows, columns))


def collate(samples: Iterable[list[LabelledPicture]]) -> LabelledPicture:
    """Joins pictures into one pack."""
    pictures = [picture for sample in samples for picture in sample]
    names = [field.name for field in dataclasses.fields(LabelledPicture)]
    return LabelledPicture(**{name: torch.cat([getattr(picture, name) for picture in pictures]) for name in names})


@dataclasses.dataclass(frozen=True)
class Score:
    """How well an update's pictures were told.

    Attributes:
        loss: of the update.
        kinds: share of the shapes' tokens whose kind was told.
        colors: likewise for the colour.
        centres: distance between centres told and true ones, as a share of a side.
        places: likewise for the places.
    """

    loss: float
    kinds: float
    colors: float
    centres: float
    places: float


def train(
    encoder: nn.Module,
    batches: Iterable[LabelledPicture],
    *,
    num_updates: int,
    merge: int,
    rate: float,
    report: Callable[[Score], None],
) -> None:
    """Trains an encoder in place.

    Args:
        encoder: a `VideoLlama3VisionModel`.
        batches: of `collate`.
        num_updates: how many there are.
        merge: side of the block of patches of a visual token.
        rate: learning rate (`MuonWithAdamW`).
        report: called after every update.
    """
    width = encoder.config.hidden_size
    heads = nn.ModuleList(nn.Linear(width, size) for size in (1 + len(KINDS), 1 + len(COLORS), 2, 2))
    named = [*encoder.named_parameters(), *heads.named_parameters()]
    optimizer = _optimizer(named, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / num_updates))
    )
    encoder.train()
    for batch in batches:
        merges = torch.full((len(batch.grids),), merge)
        hidden = encoder(pixel_values=batch.pixels, grid_thw=batch.grids, merge_sizes=merges).last_hidden_state
        loss, score = _loss([head(hidden) for head in heads], batch)
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in named], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(score)


def _optimizer(named: list[tuple[str, nn.Parameter]], rate: float) -> MuonWithAdamW:
    return MuonWithAdamW(
        [
            {
                "params": [parameter for name, parameter in named if is_muon_parameter(name, parameter) == muon],
                "lr": rate,
                "weight_decay": 0.0,
                "muon": muon,
            }
            for muon in (True, False)
        ]
    )


def _loss(told: list[torch.Tensor], batch: LabelledPicture) -> tuple[torch.Tensor, Score]:
    *logits, told_centres, told_places = told
    there = batch.labels[:, 0] != NONE
    places = (told_places - batch.places).abs().mean()
    centres = (told_centres - batch.centres)[there].abs().mean()
    loss = places + _WEIGHT_OF_CENTRES * centres
    for i, values in enumerate(logits):
        weight = torch.ones(values.shape[1])
        weight[NONE] = _WEIGHT_OF_NONE
        loss = loss + nn.functional.cross_entropy(values, batch.labels[:, i], weight=weight)
    kinds, colors = ((logits[i].argmax(dim=1) == batch.labels[:, i])[there].float().mean().item() for i in range(2))
    return loss, Score(loss.item(), kinds, colors, centres.item(), places.item())


class _Report:
    """Prints means over so many updates."""

    def __init__(self, every: int) -> None:
        self.every, self.scores, self.started = every, list[Score](), time.process_time()

    def __call__(self, score: Score) -> None:
        self.scores.append(score)
        if len(self.scores) % self.every == 0:
            last = [dataclasses.astuple(one) for one in self.scores[-self.every :]]
            loss, kinds, colors, centres, places = np.mean(last, axis=0)
            print(
                f"{len(self.scores)} updates, {time.process_time() - self.started:.0f} CPU s: loss {loss:.3f}, "
                f"kind {kinds:.1%}, colour {colors:.1%}, centre {centres:.3f} and place {places:.3f} of a side apart",
                flush=True,
            )


def main() -> None:
    """Trains and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=int, default=27000, help="that are looked at: captions, pictures, clips")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0, help="that the data was made with")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    processor = AutoProcessor.from_pretrained(options.start)
    model = AutoModelForImageTextToText.from_pretrained(options.start, dtype=torch.float32)
    numbers = range(options.files // 3)
    files = [(part, number) for number in numbers for part in (CAPTIONS, PICTURES, CLIPS)]
    pictures = LabelledPictures(options.data, processor, files, seed=options.seed)
    loader = torch.utils.data.DataLoader(
        pictures,
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=1,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(options.seed),
    )
    merge = processor.image_processor.merge_size
    encoder = model.model.vision_model
    train(encoder, loader, num_updates=len(loader), merge=merge, rate=options.rate, report=_Report(every=50))
    model.save_pretrained(options.folder)
    processor.save_pretrained(options.folder)
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    main()
