"""Which frames a full session forgets.

A transcript that has become too long enters, one with fewer frames leaves; reading its prompt again is left to
`prompt_cache.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from .transcript import Transcript

ForgettingPolicy = Literal["oldest", "thin", "never"]
FORGETTING_POLICIES: tuple[ForgettingPolicy, ...] = ("oldest", "thin", "never")
# This share of the cache stays filled, so that the next rebuild comes only after the rest has grown again: every new
# token then costs at most 0.75 / 0.25 = 3 tokens of reading again.
_SHARE_AFTER_FORGETTING = 0.75


def with_room(transcript: Transcript, num_tokens: int, *, max_tokens: int, policy: ForgettingPolicy) -> Transcript:
    """Forgets frames where the prompt, with `num_tokens` more, would be longer than allowed.

    Args:
        transcript: stays as it is.
        num_tokens: that are about to come.
        max_tokens: of the prompt.
        policy: which frames go.

    Returns:
        A transcript with room; the same one where it has.

    Raises:
        ValueError: when there are not enough frames to forget.
    """
    while transcript.num_tokens + num_tokens > max_tokens:
        total = transcript.num_tokens + num_tokens
        kept = frames_to_keep(
            transcript.frame_costs, excess=total - int(max_tokens * _SHARE_AFTER_FORGETTING), policy=policy
        )
        if len(kept) == len(transcript.frames):
            raise ValueError(
                f"Expected at most max_cache_tokens={max_tokens} tokens, got {total} with {len(kept)} frames left and "
                f"forget={policy!r}: raise it, ask for shorter answers, or remember less."
            )
        transcript = transcript.with_frames(kept)
    return transcript


def frames_to_keep(frame_tokens: Mapping[int, int], *, excess: int, policy: ForgettingPolicy) -> list[int]:
    """Chooses the frames that stay.

    Args:
        frame_tokens: tokens of each frame held, those of its time included, by its number, in order of time.
        excess: tokens to get rid of, at least.
        policy: "oldest": the first frames go. "thin": every second frame of the older half goes, and again, so that
            a stream that goes on for ever is remembered the more sparsely the longer ago it was:

                held      0 1 2 3 4 5 6 7
                then      0   2   4 5 6 7
                later     0       4   6   8 9 10 11 ...

            "never": all stay.

    Returns:
        Numbers in order of time. Fewer tokens than `excess` go when there are no more; the last frame always stays.
    """
    if policy == "never":
        return list(frame_tokens)
    numbers = list(frame_tokens)
    while excess > 0 and len(numbers) > 1:
        going = _thinned(numbers) if policy == "thin" else [numbers[0]]
        for number in going:
            if excess <= 0:
                break
            numbers.remove(number)
            excess -= frame_tokens[number]
    return numbers


def _thinned(numbers: list[int]) -> list[int]:
    """Every second one of the older half, the oldest first; the oldest itself where there is nothing in between."""
    older = numbers[: max(2, len(numbers) // 2)]
    return older[1::2] if len(numbers) > 2 else [numbers[0]]
