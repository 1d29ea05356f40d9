"""What a session tells about itself: its sizes, what it said by itself, what happened in it.

Counts, texts and times enter, frozen records leave; what they are counted from is left to `session.py` and
`transcript.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# Event.frame of what belongs to no frame.
NO_FRAME = -1


@dataclasses.dataclass(frozen=True)
class SessionState:
    """What a session holds.

    Attributes:
        num_tokens: of the prompt so far.
        num_frames: frames among them.
        num_kept_tokens: visual tokens among them.
        seconds: from the label of the first frame held to the end of the last tick; 0 without frames.
        cache_bytes: of the KV cache, those that hold tokens.
        allocated_cache_bytes: of the KV cache, with the room that is kept for further tokens. What forks have in
            common counts for each of them. Not compared: sessions that hold the same may keep different room.
        num_forgotten_frames: shown and dropped since.
        num_skipped_ticks: ticks in gaps that were left out.
        num_encoded_frames: pictures that went through the vision encoder.
        num_rebuilt_tokens: tokens that went through the language model again after forgetting.
    """

    num_tokens: int
    num_frames: int
    num_kept_tokens: int
    seconds: float
    cache_bytes: int
    allocated_cache_bytes: int = dataclasses.field(compare=False)
    num_forgotten_frames: int
    num_skipped_ticks: int
    num_encoded_frames: int
    num_rebuilt_tokens: int


@dataclasses.dataclass(frozen=True)
class TimedMessage:
    """What the model said by itself.

    Attributes:
        seconds: label of the frame after which it spoke.
        text: what it said.
        probability: of speaking rather than staying silent, after that frame.
    """

    seconds: float
    text: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing shown or said.

    Attributes:
        kind: a frame, a question, an instruction (said without asking), or the assistant's words: answers to
            questions, and what it said by itself.
        text: of a question or an instruction.
        frame: number of the frame; of what the model said by itself, of the frame after which it spoke.
        ids: of the assistant's words, without the token that ends them.
    """

    kind: Literal["frame", "question", "instruction", "answer", "remark"]
    text: str = ""
    frame: int = NO_FRAME
    ids: tuple[int, ...] = ()
