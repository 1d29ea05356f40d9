"""Which frames a full session forgets.

The tokens of the frames held enter, the numbers of those that stay leave; writing the prompt anew is left to
`session.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

ForgettingPolicy = Literal["oldest", "thin", "never"]
FORGETTING_POLICIES: tuple[ForgettingPolicy, ...] = ("oldest", "thin", "never")


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
