"""One row -> its tokens and raw pixels, or the reason why its media cannot be read.

A row of `input_rows.py` enters; token ids and uint8 patches leave, small enough to cross from a decoding process to
the model's. Running many of these is left to `reading_pool.py` and `ray_run.py`.
"""

from __future__ import annotations

import dataclasses
import errno
import time
from typing import Any

import numpy as np
import torch

from ..processing.encoded_prompt import EncodedPrompt
from ..processing.processing_videollama3 import VideoLlama3Processor
from ..processing.video_reading import limit_decoders
from .input_rows import BulkRow

# What a machine runs out of is no fault of the medium that was being read.
_OUT_OF_RESOURCES = (errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE)


@dataclasses.dataclass(frozen=True)
class ReadRow:
    """A row that is ready for the model.

    Attributes:
        row: what was asked.
        prompt: its token ids, and its media as uint8 patches.
        read_seconds: how long reading took.
    """

    row: BulkRow
    prompt: EncodedPrompt
    read_seconds: float

    @property
    def num_visual_tokens(self) -> int:
        """Kept tokens of all its media."""
        return sum(int(item.keep.sum()) for item in self.prompt.media)


@dataclasses.dataclass(frozen=True)
class FailedRow:
    """A row without an answer.

    Attributes:
        row: what was asked.
        reason: one line.
        read_seconds: how long reading took until then.
    """

    row: BulkRow
    reason: str
    read_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Reads rows one at a time; can be pickled.

    Attributes:
        processor: of the checkpoint.
        system_prompt: whether the released models' system prompt comes first.
        prune: False to keep visual tokens that do not change; None for what the checkpoint says.
    """

    processor: VideoLlama3Processor
    system_prompt: bool = True
    prune: bool | None = None

    def read(self, row: BulkRow) -> ReadRow | FailedRow:
        """Reads one row's media.

        Returns:
            The row, or why its media cannot be read.

        Raises:
            MemoryError: and everything else that is no fault of the media.
        """
        start = time.perf_counter()
        try:
            prompt = self._encode(row.messages, row.max_visual_tokens)
        except (OSError, ValueError) as error:
            # What the processor raises for a bad medium; decoders' own errors are of these kinds, too.
            if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
                raise
            return FailedRow(row, " ".join(str(error).split()) or type(error).__name__, time.perf_counter() - start)
        return ReadRow(row, _slim(prompt), time.perf_counter() - start)

    def check(self) -> None:
        """Prepares a grey picture: what fails there would fail for every row.

        Raises:
            ValueError: for instance when the checkpoint's pixel settings are not those that the model applies.
        """
        picture = np.full((28, 28, 3), 128, dtype=np.uint8)
        self._encode([{"role": "user", "content": [{"type": "image", "image": picture}, "?"]}], None)

    def _encode(self, messages: list[dict[str, Any]], max_visual_tokens: int | None) -> EncodedPrompt:
        return self.processor.encode_conversation(
            messages,
            add_system_prompt=self.system_prompt,
            add_generation_prompt=True,
            pixel_dtype="uint8",
            max_visual_tokens=max_visual_tokens,
            use_token_compression=self.prune,
        )


def _slim(prompt: EncodedPrompt) -> EncodedPrompt:
    """Without what the model does not need."""
    return EncodedPrompt(prompt.prompt, [dataclasses.replace(item, metadata=None) for item in prompt.media])


def use_one_thread() -> None:
    """For a process of many that read: threads do not multiply by processes."""
    torch.set_num_threads(1)
    limit_decoders(1)
