"""The parts of a session <-> the record and the tensors that are saved of them.

Sampler, encoder, transcript and cache enter and leave; a record of another model is refused. Files and their format
are left to `session_files.py`.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from ..processing.media_sources import Pixels
from .frame_encoder import FrameEncoder
from .prompt_cache import PromptCache
from .session_files import check_same_model, fingerprint, read_session, write_session
from .tick_sampler import TickSampler
from .transcript import Transcript


def save_parts(
    folder: str | os.PathLike[str],
    model: Any,
    processor: Any,
    *,
    arguments: dict[str, Any],
    sampler: TickSampler[Pixels],
    encoder: FrameEncoder,
    transcript: Transcript,
    cache: PromptCache,
) -> None:
    """Writes a session.

    Args:
        folder: made where there is none.
        model: that the cache belongs to.
        processor: its processor.
        arguments: of the session's constructor, but for the rate.
        sampler: in the middle of a tick, with the picture that it shows.
        encoder: with the frame that the next one is compared with.
        transcript: what was shown and said.
        cache: what was read of it.
    """
    record = {
        "fingerprint": fingerprint(model, processor),
        "arguments": arguments,
        "sampler": sampler.state(),
        "size": encoder.size,
        "num_encoded": encoder.num_encoded,
        "num_rebuilt_tokens": cache.num_rebuilt_tokens,
        **transcript.record(),
    }
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.tensors().items()} | cache.tensors()
    if (features := transcript.features()) is not None:
        tensors["features"] = features
    if sampler.picture is not None:
        tensors["picture"] = torch.from_numpy(sampler.picture)
    write_session(folder, record, tensors)


@dataclasses.dataclass(frozen=True)
class SavedSession:
    """A session as it was read.

    Attributes:
        arguments: of the session's constructor, but for the rate.
        sampler: in the middle of its tick.
        record: what `save_parts` recorded.
        tensors: by name, on the CPU.
    """

    arguments: dict[str, Any]
    sampler: TickSampler[Pixels]
    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def restore(self, encoder: FrameEncoder, transcript: Transcript, cache: PromptCache) -> None:
        """Fills the parts of a new session."""
        size, device = self.record["size"], cache.device
        encoder.size = tuple(size) if size else None
        encoder.num_encoded = self.record["num_encoded"]
        encoder.restore(
            {
                name: self.tensors[f"encoder.{name}"].to(device)
                for name in ("patches", "tokens")
                if f"encoder.{name}" in self.tensors
            }
        )
        features = self.tensors.get("features")
        transcript.restore(self.record, None if features is None else features.to(device))
        cache.num_rebuilt_tokens = self.record["num_rebuilt_tokens"]
        cache.restore(self.tensors)


def load_parts(folder: str | os.PathLike[str], model: Any, processor: Any) -> SavedSession:
    """Reads what `save_parts` wrote.

    Raises:
        FileNotFoundError: where no session was saved.
        ValueError: for another model or processor, and for damaged files.
    """
    record, tensors = read_session(folder)
    check_same_model(record["fingerprint"], fingerprint(model, processor))
    picture = tensors.get("picture")
    sampler = TickSampler.from_state(record["sampler"], None if picture is None else picture.numpy())
    return SavedSession(record["arguments"], sampler, record, tensors)
