"""Pictures of ticks -> features of the visual tokens that are kept.

uint8 pictures enter in order, projected features leave; each picture is resized, compared with the one before and
encoded once. When ticks end is left to `tick_sampler.py`, where features go to `session.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..processing.media_requests import PixelSettings
from ..processing.media_sources import Pixels
from ..processing.patches import keep_mask, normalize_patches, patchify
from ..processing.visual_budget import ItemSize, target_sizes
from .placement import input_device


@dataclasses.dataclass(frozen=True)
class FrameTokens:
    """What is kept of one frame.

    Attributes:
        seconds: its label.
        features: (kept tokens, width of the language model), on the model's device.
        num_visual_tokens: before pruning.
    """

    seconds: float
    features: torch.Tensor
    num_visual_tokens: int

    @property
    def num_kept(self) -> int:
        """Kept tokens."""
        return int(self.features.shape[0])


class FrameEncoder:
    """Encodes frames one after the other, all at one size.

    Args:
        model: a `VideoLlama3ForCausalLM`.
        settings: the video processor's.
        horizon_frames: for so many frames in all the size of the pictures is planned, from the first one's size.
        max_visual_tokens: of a video of `horizon_frames` frames, before pruning; None for the processor's budget.
        size: (height, width) in pixels instead of a planned one; multiples of patch and merge size.
    """

    def __init__(
        self,
        model: Any,
        settings: PixelSettings,
        *,
        horizon_frames: int,
        max_visual_tokens: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self._model = model
        self._settings = settings
        self._horizon_frames = horizon_frames
        self._max_visual_tokens = max_visual_tokens
        self.size = size
        self._table = settings.table
        self._previous: Pixels | None = None
        self._previous_tokens: torch.Tensor | None = None
        vision = model.config.vision_config
        usual = settings.do_rescale and settings.do_normalize and abs(settings.rescale_factor - 1 / 255) < 1e-9
        same = (tuple(vision.image_mean), tuple(vision.image_std)) == (settings.image_mean, settings.image_std)
        self._raw = usual and same
        self.num_encoded = 0

    def plan(self, height: int, width: int) -> tuple[int, int]:
        """The size that every picture is resized to, decided by the first one's.

        Raises:
            ValueError: where pictures may not be resized and do not fit the grid of patches.
        """
        factor = self._settings.patch_size * self._settings.merge_size
        if self.size is None and not self._settings.do_resize:
            if height % factor or width % factor:
                raise ValueError(
                    f"Expected pictures with sides that are multiples of {factor} pixels, since do_resize is off, got "
                    f"{height} x {width}."
                )
            self.size = (height, width)
        if self.size is None:
            (self.size,) = target_sizes(
                [ItemSize(self._horizon_frames, height, width, self._settings.merge_size)],
                patch_size=self._settings.patch_size,
                min_tokens=self._settings.min_tokens,
                max_tokens=self._settings.max_tokens,
                max_visual_tokens=self._max_visual_tokens,
            )
        return self.size

    @torch.no_grad()
    def encode(self, pictures: Sequence[Pixels], seconds: Sequence[float]) -> list[FrameTokens]:
        """Encodes the next pictures.

        Args:
            pictures: uint8 (height, width, 3) each, RGB.
            seconds: their labels.

        Returns:
            One record per picture, in order.
        """
        if not pictures:
            return []
        patches = self._patches(pictures)
        keep = self._keep(patches)
        features = self._features(patches, keep)
        return [FrameTokens(label, part, mask.size) for label, part, mask in zip(seconds, features, keep, strict=True)]

    def _patches(self, pictures: Sequence[Pixels]) -> Pixels:
        """Patches, uint8 (frames, patches, values)."""
        height, width = self.plan(*pictures[0].shape[:2])
        settings = self._settings
        patches = patchify(
            iter(pictures),
            num_frames=len(pictures),
            height=height,
            width=width,
            patch_size=settings.patch_size,
            merge_size=settings.merge_size,
            resample=settings.resample,
        )
        return patches.reshape(len(pictures), -1, patches.shape[-1])

    def _keep(self, patches: Pixels) -> npt.NDArray[np.bool_]:
        """Mask of bool (frames, visual tokens); the first frame of a stream is kept whole."""
        settings = self._settings
        tokens = patches.shape[1] // settings.merge_size**2
        if not settings.use_token_compression:
            return np.ones((len(patches), tokens), dtype=bool)
        joined = patches if self._previous is None else np.concatenate([self._previous[None], patches])
        mask = keep_mask(
            joined.reshape(-1, patches.shape[-1]),
            num_frames=len(joined),
            merge_size=settings.merge_size,
            table=self._table,
            threshold=settings.compression_threshold,
            min_tokens=settings.compression_min_tokens,
        ).reshape(len(joined), tokens)
        return mask[len(joined) - len(patches) :]

    def _features(self, patches: Pixels, keep: npt.NDArray[np.bool_]) -> list[torch.Tensor]:
        """Projected features of the kept tokens of each frame; a frame like the one before is not encoded again."""
        before = [self._previous, *patches[:-1]]
        new = [
            previous is None or not np.array_equal(frame, previous)
            for frame, previous in zip(patches, before, strict=True)
        ]
        encoded = iter(self._encode(patches[np.array(new)]) if any(new) else [])
        result = []
        for is_new, mask in zip(new, keep, strict=True):
            if is_new:
                self._previous_tokens = next(encoded)
            assert self._previous_tokens is not None
            kept = self._previous_tokens[torch.from_numpy(mask).to(self._previous_tokens.device)]
            result.append(self._model.model.projector(kept))
        self._previous = patches[-1]
        return result

    def _encode(self, patches: Pixels) -> list[torch.Tensor]:
        """(visual tokens, width of the encoder) of each frame."""
        height, width = self.size or (0, 0)
        patch, merge = self._settings.patch_size, self._settings.merge_size
        device = input_device(self._model.get_input_embeddings())
        # Raw grey levels where the model normalises them itself: a quarter of the bytes on the way.
        pixels = patches.reshape(-1, patches.shape[-1])
        values = torch.from_numpy(pixels if self._raw else normalize_patches(pixels, self._table))
        tokens = self._model.model.vision_model(
            pixel_values=values.to(device),
            grid_thw=torch.tensor([[len(patches), height // patch, width // patch]]),
            merge_sizes=torch.tensor([merge]),
            return_dict=True,
        ).last_hidden_state
        self.num_encoded += len(patches)
        return list(tokens.reshape(len(patches), -1, tokens.shape[-1]))

    def copy(self) -> FrameEncoder:
        """An encoder that goes on from the same frame."""
        twin = FrameEncoder(
            self._model,
            self._settings,
            horizon_frames=self._horizon_frames,
            max_visual_tokens=self._max_visual_tokens,
            size=self.size,
        )
        twin._previous, twin._previous_tokens = self._previous, self._previous_tokens
        twin.num_encoded = self.num_encoded
        return twin

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the next frame is compared with, for saving; empty before the first frame."""
        if self._previous is None or self._previous_tokens is None:
            return {}
        return {"patches": torch.from_numpy(self._previous), "tokens": self._previous_tokens}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """The reverse of `tensors`."""
        if tensors:
            self._previous = tensors["patches"].cpu().numpy()
            self._previous_tokens = tensors["tokens"]
