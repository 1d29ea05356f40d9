"""One conversation, tokenized and with its media encoded, before it is padded, packed or labelled.

Token ids and encoded media enter; tensors of one row leave, whole or cut to a length. Batches are left to
`token_rows.py`, labels to the training code.
"""

from __future__ import annotations

import dataclasses

import torch

from .media_requests import EncodedMedia, to_image_tensors, to_video_tensors
from .prompt_tokens import TokenizedPrompt


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """One row.

    Attributes:
        prompt: its tokens.
        media: its images and videos, in order of their tokens.
    """

    prompt: TokenizedPrompt
    media: list[EncodedMedia]

    def tensors(self) -> dict[str, torch.Tensor]:
        """`input_ids`, int64 (tokens,), and the media tensors, where there are media."""
        ids = torch.tensor(self.prompt.input_ids, dtype=torch.int64)
        return {"input_ids": ids, **to_image_tensors(self.media), **to_video_tensors(self.media)}

    def truncated(self, limit: int) -> EncodedPrompt:
        """The row cut on the right to at most `limit` tokens, never inside a picture.

        A frame that does not fit whole goes with its time (in a `stream` message: with the whole message), and
        everything after it; frames and images that have no tokens left are taken out of the media.
        """
        cut = min(limit, len(self.prompt.input_ids))
        cut = next((start for start, end in self.prompt.pictures if start < cut < end), cut)
        prompt = self.prompt.cut(0, cut)
        left = len(prompt.pictures)
        media = []
        for item in self.media:
            frames = min(left, item.grid_thw[0])
            if frames:
                media.append(_first_frames(item, frames))
            left -= frames
        return EncodedPrompt(prompt, media)


def _first_frames(item: EncodedMedia, count: int) -> EncodedMedia:
    frames, rows, columns = item.grid_thw
    if count == frames:
        return item
    return dataclasses.replace(
        item,
        patches=item.patches[: count * rows * columns],
        grid_thw=(count, rows, columns),
        keep=item.keep[: count * rows * columns // item.merge_size**2],
        timestamps=None if item.timestamps is None else item.timestamps[:count],
        metadata=None,
    )
