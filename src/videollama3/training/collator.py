"""Samples -> the tensors of one step: one packed row without padding, or padded rows.

Dictionaries of one sample each enter (`input_ids`, unshifted `labels`, media), the model's arguments leave. Which
samples belong together is left to `packing.py`, labels to the dataset.

Three documents of 3, 2 and 4 tokens in one row; the first label of each is taken away, since the token before it
belongs to another document (the model moves labels by one inside the row):

    input_ids      a a a b b c c c c
    position_ids   0 1 2 0 1 0 1 2 3
    labels         - a a - b - c c c
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

Sample = dict[str, torch.Tensor]
IGNORE_INDEX = -100
_DUMMY_MERGE = 2


class _Item(NamedTuple):
    """An image, a video or a part of one: where its tokens stand, and its tensors."""

    start: int
    stop: int
    pixels: torch.Tensor
    grid: tuple[int, int, int]
    merge: int
    keep: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Collator:
    """What both collators share.

    Attributes:
        image_token_id: placeholder of a visual token of an image.
        video_token_id: placeholder of a kept visual token of a video.
        dummy_frame: whether a step without media gets one frame of 2 x 2 patches whose only token is pruned: the
            encoder and the projector run (processes that wait for each other's gradients or shards do not hang,
            gradients are zero instead of missing), and nothing reaches the language model.
        patch_values: values of a patch, channels * patch_size**2.
    """

    image_token_id: int
    video_token_id: int
    dummy_frame: bool = True
    patch_values: int = 3 * 14 * 14

    @classmethod
    def for_processor(cls, processor: Any, **options: Any) -> Any:
        """A collator with the placeholders of a processor.

        Args:
            processor: a `VideoLlama3Processor`.
            options: further arguments of the class.
        """
        patch_values = 3 * processor.image_processor.patch_size**2
        return cls(
            image_token_id=processor.image_token_id,
            video_token_id=processor.video_token_id,
            **{"patch_values": patch_values, **options},
        )

    def _read(self, samples: Sequence[Sample | None]) -> list[Sample]:
        present = [sample for sample in samples if sample is not None]
        if not present:
            raise ValueError(
                f"Expected at least one sample that could be read, got {len(samples)} that were skipped: look at "
                'what the dataset reports, or set on_error="raise".'
            )
        return present

    def _media(self, samples: Sequence[Sample]) -> Sample:
        """All media as one video input, in order of their tokens, so that the encoder runs once a step."""
        items = [item for sample in samples for item in _items(sample, self.image_token_id, self.video_token_id)]
        if not items:
            return self._dummy() if self.dummy_frame else {}
        return {
            "pixel_values_videos": torch.cat([item.pixels for item in items]),
            "video_grid_thw": torch.tensor([item.grid for item in items]),
            "video_merge_sizes": torch.tensor([item.merge for item in items]),
            "video_compression_mask": torch.cat([item.keep for item in items]),
        }

    def _dummy(self) -> Sample:
        return {
            "pixel_values_videos": torch.zeros(_DUMMY_MERGE**2, self.patch_values, dtype=torch.uint8),
            "video_grid_thw": torch.tensor([[1, _DUMMY_MERGE, _DUMMY_MERGE]]),
            "video_merge_sizes": torch.tensor([_DUMMY_MERGE]),
            "video_compression_mask": torch.tensor([False]),
        }

    def _ids(self, sample: Sample) -> torch.Tensor:
        # A placeholder only says where features go; images are given as videos of one frame.
        ids = sample["input_ids"]
        return torch.where(ids == self.image_token_id, self.video_token_id, ids)


@dataclasses.dataclass(frozen=True)
class PackingCollator(_Collator):
    """Joins samples into one row without padding; positions restart at every document.

    Attributes:
        bounds: whether to give `cu_seq_lens_q`, `cu_seq_lens_k` (int32 (documents + 1,)) and `max_length_q`,
            `max_length_k`: `torch_varlen` goes by them alone, flash attention else looks for the restarts itself,
            once per layer.
    """

    bounds: bool = False

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Any]:
        """Packs samples.

        Args:
            samples: `input_ids` int64 (tokens,), `labels` int64 (tokens,) aligned with them and -100 where not
                trained, media as the processor gives them; None for a skipped one.

        Returns:
            `input_ids`, `labels`, `position_ids` int64 (1, tokens of all), no `attention_mask`;
            `pixel_values_videos` and its companions for images and videos alike, in order of their tokens.

        Raises:
            ValueError: when all samples were skipped; when placeholders and media of a sample disagree.
        """
        documents = self._read(samples)
        lengths = [len(document["input_ids"]) for document in documents]
        batch: dict[str, Any] = {
            "input_ids": torch.cat([self._ids(document) for document in documents]).unsqueeze(0),
            "labels": torch.cat([_labels(document) for document in documents]).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
            **self._media(documents),
        }
        if self.bounds:
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            batch.update(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
            batch.update(max_length_q=max(lengths), max_length_k=max(lengths))
        return batch


@dataclasses.dataclass(frozen=True)
class PaddingCollator(_Collator):
    """Pads samples on the right to the longest, one row each; for comparisons, and for those who want it.

    Attributes:
        pad_token_id: what ids are padded with.
    """

    pad_token_id: int = 0

    @classmethod
    def for_processor(cls, processor: Any, **options: Any) -> Any:
        """A collator with the placeholders and the pad token of a processor.

        Args:
            processor: a `VideoLlama3Processor`.
            options: further arguments of the class.
        """
        return super().for_processor(processor, **{"pad_token_id": processor.tokenizer.pad_token_id, **options})

    def __call__(self, samples: Sequence[Sample | None]) -> dict[str, Any]:
        """Pads samples.

        Args:
            samples: as for `PackingCollator`.

        Returns:
            `input_ids`, `labels`, `attention_mask` int64 (samples, tokens of the longest), media as from
            `PackingCollator`.

        Raises:
            ValueError: as from `PackingCollator`.
        """
        documents = self._read(samples)
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([self._ids(d) for d in documents], batch_first=True, padding_value=self.pad_token_id),
            "labels": pad([_labels(d) for d in documents], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": pad([torch.ones_like(d["input_ids"]) for d in documents], batch_first=True),
            **self._media(documents),
        }


def _labels(sample: Sample) -> torch.Tensor:
    """Labels of a document; its first token is nobody's target."""
    labels = sample["labels"].clone()
    if labels.shape != sample["input_ids"].shape:
        raise ValueError(
            f"Expected one label per input id, got {tuple(labels.shape)} labels and "
            f"{tuple(sample['input_ids'].shape)} ids."
        )
    labels[:1] = IGNORE_INDEX
    return labels


def _items(sample: Sample, image_token_id: int, video_token_id: int) -> list[_Item]:
    """The media of a sample in order of their tokens."""
    images = _items_of(sample, image_token_id, "pixel_values", "image")
    videos = _items_of(sample, video_token_id, "pixel_values_videos", "video")
    if any(video.start < image.start < video.stop for video in videos for image in images):
        # Messages stand between the frames of a video, and images may stand in them (streaming rows).
        videos = _items_of(sample, video_token_id, "pixel_values_videos", "video", by_frame=True)
    return sorted(images + videos, key=lambda item: item.start)


def _items_of(sample: Sample, token_id: int, pixels_name: str, kind: str, *, by_frame: bool = False) -> list[_Item]:
    positions = (sample["input_ids"] == token_id).nonzero().flatten()
    pixels = sample.get(pixels_name)
    if pixels is None:
        if len(positions):
            raise ValueError(f"Expected {pixels_name} for {len(positions)} {kind} placeholders, got none.")
        return []
    grids = [tuple(grid) for grid in sample[f"{kind}_grid_thw"].tolist()]
    merges = sample[f"{kind}_merge_sizes"].tolist()
    if by_frame:
        merges = [merge for (frames, _, _), merge in zip(grids, merges, strict=True) for _ in range(frames)]
        grids = [(1, rows, columns) for frames, rows, columns in grids for _ in range(frames)]
    num_patches = [frames * rows * columns for frames, rows, columns in grids]
    num_tokens = [count // merge**2 for count, merge in zip(num_patches, merges, strict=True)]
    keep = sample.get("video_compression_mask") if kind == "video" else None
    keeps = (torch.ones(sum(num_tokens), dtype=torch.bool) if keep is None else keep).split(num_tokens)
    kept = [int(part.sum()) for part in keeps]
    if sum(kept) != len(positions):
        raise ValueError(
            f"Expected as many {kind} placeholders (id {token_id}) as kept visual tokens, got {len(positions)} and "
            f"{sum(kept)}: the sample's ids were cut, or belong to other media."
        )
    items = []
    first = 0
    for part, grid, merge, mask, count in zip(pixels.split(num_patches), grids, merges, keeps, kept, strict=True):
        if count:
            start, last = int(positions[first]), int(positions[first + count - 1])
            items.append(_Item(start, last + 1, part, grid, merge, mask))
        first += count
    return items
