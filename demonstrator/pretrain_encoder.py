"""The demonstrator's vision encoder learns to see, before there are words: what stands at each visual token.

Pictures that `make_data.py` drew and the checkpoint of `build_model.py` enter; the same checkpoint with a trained
vision encoder leaves. It stands for SigLIP's own training, from which the paper's encoder starts: the recipes then do
what the paper's stages do.

    python -m demonstrator.pretrain_encoder DATA START FOLDER

For each visual token linear heads, thrown away afterwards, tell kind, colour and centre of the shape that covers it,
or that there is none; whether a centre stands in the token itself, which is so in one token of each shape, and how
many shapes the picture has; and where in the picture the token stands: after pruning the language model could not
count it out. Four tokens of a picture with a red circle on the left:

    kind    circle none     colour  red none    centre  (0.2, 0.4) -    place   (0.25, 0.25) (0.75, 0.25)
            circle none             red none            (0.2, 0.4) -            (0.25, 0.75) (0.75, 0.75)
    holds   yes    no       number  1   1
            no     no               1   1
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

from .make_data import CAPTIONS, PICTURES, Counts, rng_of
from .scenes import COLORS, KINDS, MAX_SHAPES, Scene, random_picture

NONE = 0
# A token belongs to the shape that covers this share of it, or of which it covers this share.
_SHARE_OF_COVER = 0.25
# Most tokens show the background.
_WEIGHT_OF_NONE = 0.2
# Of what is told of a whole picture, by each of its tokens.
_WEIGHT_OF_NUMBER = 0.5
# A centre is told twice: as two numbers, and as the bin of each axis that it is in, neighbours half right. Numbers
# alone are a whisper in the output, two of its directions; bins are as loud as kinds and colours.
_NUM_BINS = 20
_WEIGHT_OF_BINS = 0.3
_FOLDERS = {CAPTIONS: "captions", PICTURES: "pictures"}


def picture_scene(part: int, number: int, *, seed: int) -> Scene:
    """What `make_data.py` drew into a file."""
    return random_picture(rng_of(seed, part, number), count=1 if part == CAPTIONS else None)


def token_labels(scene: Scene, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What shape is at each visual token.

    Args:
        scene: of a picture.
        rows: of visual tokens.
        columns: of visual tokens.

    Returns:
        Kind, colour, whether a centre stands in the token, number of shapes, int64 (rows * columns, 4): 0 for none,
        else 1 + index in `KINDS` and in `COLORS`, then 0 or 1, then the number less one; centre, float32 (rows *
        columns, 2): x and y as shares of the sides, zeros for none.
    """
    labels = torch.zeros(rows, columns, 4, dtype=torch.int64)
    labels[..., 3] = len(scene.shapes) - 1
    centers = torch.zeros(rows, columns, 2)
    best = torch.zeros(rows, columns)
    height, width = scene.height / rows, scene.width / columns
    for shape in scene.shapes:
        x, y, half = shape.motion.x, shape.motion.y, shape.size / 2
        labels[int(y // height), int(x // width), 2] = 1
        for row in range(max(0, int((y - half) // height)), min(rows, math.ceil((y + half) / height))):
            for column in range(max(0, int((x - half) // width)), min(columns, math.ceil((x + half) / width))):
                high = min(y + half, (row + 1) * height) - max(y - half, row * height)
                wide = min(x + half, (column + 1) * width) - max(x - half, column * width)
                share = high * wide / min(height * width, shape.size**2)
                if share >= _SHARE_OF_COVER and share > best[row, column]:
                    best[row, column] = share
                    labels[row, column, 0] = 1 + KINDS.index(shape.kind)
                    labels[row, column, 1] = 1 + COLORS.index(shape.color)
                    centers[row, column] = torch.tensor([x / scene.width, y / scene.height])
    return labels.flatten(0, 1), centers.flatten(0, 1)


def token_places(rows: int, columns: int) -> torch.Tensor:
    """Where the centre of each visual token stands: float32 (rows * columns, 2), x and y as shares of the sides."""
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


class LabelledPictures(torch.utils.data.Dataset[Any]):
    """Pictures: pixels uint8 (patches, 588), grid (3,); labels, centres, places of their tokens (tokens, 2) each."""

    def __init__(self, folder: Path, processor: Any, files: Sequence[tuple[int, int]], *, seed: int) -> None:
        """Names the pictures.

        Args:
            folder: of `make_data.py`.
            processor: of the checkpoint; its image processor is used.
            files: part (CAPTIONS or PICTURES) and number of each.
            seed: that the data was made with.
        """
        self.folder, self.processor, self.files, self.seed = folder, processor.image_processor, files, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        part, number = self.files[index]
        path = str(self.folder / _FOLDERS[part] / f"{number:06d}.png")
        features = self.processor([path], pixel_dtype="uint8", return_tensors="pt")
        grid = features["image_grid_thw"][0]
        merge = int(features["image_merge_sizes"][0])
        rows, columns = int(grid[1]) // merge, int(grid[2]) // merge
        labels, centers = token_labels(picture_scene(part, number, seed=self.seed), rows, columns)
        return features["pixel_values"], grid, labels, centers, token_places(rows, columns)


def collate(samples: list[Any]) -> tuple[torch.Tensor, ...]:
    """Joins pictures into one pack."""
    pixels, grids, *told = zip(*samples, strict=True)
    return torch.cat(pixels), torch.stack(grids), *(torch.cat(values) for values in told)


@dataclasses.dataclass(frozen=True)
class Score:
    """How well an update's pictures were told.

    Attributes:
        loss: of the update.
        kinds: share of the shapes' tokens whose kind was told.
        colors: likewise for the colour.
        holders: share of the shapes' tokens of which was told whether a centre stands in them.
        numbers: share of all tokens that told the number of shapes.
        center: distance between centres of shapes told and true ones, as a share of a side.
        place: likewise of the tokens' places.
    """

    loss: float
    kinds: float
    colors: float
    holders: float
    numbers: float
    center: float
    place: float


def train(
    encoder: nn.Module,
    batches: Iterable[Any],
    *,
    num_updates: int,
    merge: int,
    rate: float,
    precision: str,
    report: Callable[[Score], None],
) -> None:
    """Trains an encoder in place.

    Args:
        encoder: a `VideoLlama3VisionModel`.
        batches: of `collate`.
        num_updates: how many there are.
        merge: side of the block of patches of a visual token.
        rate: learning rate (`MuonWithAdamW`).
        precision: bf16 computes in bfloat16 on float32 weights; fp32 in float32.
        report: called after every update.
    """
    width = encoder.config.hidden_size
    sizes = (1 + len(KINDS), 1 + len(COLORS), 2, MAX_SHAPES, 2, 2, 2 * _NUM_BINS)
    heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)
    named = [*encoder.named_parameters(), *heads.named_parameters()]
    optimizer = _optimizer(named, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 30, 0.5 + 0.5 * math.cos(math.pi * step / num_updates))
    )
    encoder.train()
    for pixels, grids, labels, centers, places in batches:
        merges = torch.full((len(grids),), merge)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            hidden = encoder(pixel_values=pixels, grid_thw=grids, merge_sizes=merges).last_hidden_state.float()
        loss, score = _loss([head(hidden) for head in heads], labels, centers, places)
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


def bin_shares(centers: torch.Tensor) -> torch.Tensor:
    """How much each bin of an axis counts as the one that a centre is in: a bell one bin wide around it.

    Args:
        centers: x and y as shares of the sides, (shapes, 2).

    Returns:
        (shapes, 2, bins); 1 in sum over the bins.
    """
    steps = centers[..., None] * _NUM_BINS - (torch.arange(_NUM_BINS) + 0.5)
    return torch.softmax(-(steps**2) / 2, dim=-1)


def _loss(
    told: list[torch.Tensor], labels: torch.Tensor, centers: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, Score]:
    *logits, told_centers, told_places, told_bins = told
    there = labels[:, 0] != NONE
    center, place = (told_centers - centers)[there].abs().mean(), (told_places - places).abs().mean()
    bins = told_bins[there].unflatten(1, (2, _NUM_BINS)).flatten(0, 1)
    loss = nn.functional.cross_entropy(bins, bin_shares(centers[there]).flatten(0, 1)) * _WEIGHT_OF_BINS
    loss = loss + center + place + nn.functional.cross_entropy(logits[3], labels[:, 3]) * _WEIGHT_OF_NUMBER
    for i, values in enumerate(logits[:3]):
        weight = torch.ones(values.shape[1])
        weight[NONE] = _WEIGHT_OF_NONE
        loss = loss + nn.functional.cross_entropy(values, labels[:, i], weight=weight)
    right = [values.argmax(dim=1) == labels[:, i] for i, values in enumerate(logits)]
    shares = [*(told[there].float().mean().item() for told in right[:3]), right[3].float().mean().item()]
    return loss, Score(loss.item(), *shares, center.item(), place.item())


class _Report:
    """Prints means over so many updates."""

    def __init__(self, every: int) -> None:
        self.every, self.scores, self.started = every, list[Score](), time.process_time()

    def __call__(self, score: Score) -> None:
        self.scores.append(score)
        if len(self.scores) % self.every == 0:
            last = [dataclasses.astuple(one) for one in self.scores[-self.every :]]
            loss, kinds, colors, holders, numbers, center, place = np.mean(last, axis=0)
            print(
                f"{len(self.scores)} updates, {time.process_time() - self.started:.0f} CPU s: loss {loss:.3f}, "
                f"kind {kinds:.1%}, colour {colors:.1%}, holds a centre {holders:.1%}, number {numbers:.1%}, "
                f"centre {center:.3f} and place {place:.3f} of a side apart",
                flush=True,
            )


def main() -> None:
    """Trains and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--captions", type=int, default=Counts.captions, help="pictures of one shape that are looked at"
    )
    parser.add_argument("--pictures", type=int, default=Counts.pictures, help="pictures of one to four shapes")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--seed", type=int, default=0, help="that the data was made with")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    processor = AutoProcessor.from_pretrained(options.start)
    model = AutoModelForImageTextToText.from_pretrained(options.start, dtype=torch.float32)
    files = [(CAPTIONS, number) for number in range(options.captions)]
    files += [(PICTURES, number) for number in range(options.pictures)]
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
    train(
        encoder,
        loader,
        num_updates=len(loader),
        merge=merge,
        rate=options.rate,
        precision=options.precision,
        report=_Report(every=50),
    )
    model.save_pretrained(options.folder)
    processor.save_pretrained(options.folder)
    print(f"wrote {options.folder}")


if __name__ == "__main__":
    main()
