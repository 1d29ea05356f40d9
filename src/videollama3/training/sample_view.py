"""One sample as a person reads it: its sequence, learnt tokens coloured, and counts per message.

`input_ids` and `labels` of a sample and its tokenizer enter, text leaves; nothing is decided here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from .supervised_samples import IGNORED

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"
_MESSAGE_STARTS = ("<|im_start|>", "<|stream_start|>")


def show_sequence(ids: Sequence[int], labels: Sequence[int], processor: Any, *, color: bool) -> str:
    """The sequence as text.

    Args:
        ids: of the sample.
        labels: -100 where nothing is learnt.
        processor: whose tokenizer wrote the ids.
        color: learnt tokens in green; without colour they stand in double square brackets.

    Returns:
        The text; runs of placeholders stand as `<|video_pad|> x 42`.
    """
    begin, end = (_GREEN, _RESET) if color else ("[[", "]]")
    parts = []
    for learnt, text in _runs(ids, labels, processor):
        # A newline that is learnt must be seen, and colours end with their line.
        shown = text.replace("\n", "\\n\n") if learnt else text
        parts.append(f"{begin}{shown}{end}" if learnt else shown)
    return "".join(parts)


def _runs(ids: Sequence[int], labels: Sequence[int], processor: Any) -> Iterator[tuple[bool, str]]:
    placeholders = {processor.image_token_id: processor.image_token, processor.video_token_id: processor.video_token}
    marked = [
        (label != IGNORED, token, token if token in placeholders else None)
        for token, label in zip(ids, labels, strict=True)
    ]
    for (learnt, placeholder), run in itertools.groupby(marked, key=lambda item: (item[0], item[2])):
        tokens = [item[1] for item in run]
        if placeholder is None:
            yield learnt, processor.tokenizer.decode(tokens, skip_special_tokens=False)
        else:
            yield learnt, f"{placeholders[placeholder]} x {len(tokens)}"


def message_table(ids: Sequence[int], labels: Sequence[int], processor: Any) -> str:
    """Counts per message: tokens, visual tokens and learnt tokens.

    Args:
        ids: of the sample.
        labels: -100 where nothing is learnt.
        processor: whose tokenizer wrote the ids.
    """
    starts = {processor.tokenizer.convert_tokens_to_ids(token) for token in _MESSAGE_STARTS}
    # User text never holds control tokens: each of these ids opens a message.
    begins = [i for i, token in enumerate(ids) if token in starts]
    visual = (processor.image_token_id, processor.video_token_id)
    lines = [f"{'message':>7}  {'role':<10}{'tokens':>8}{'visual':>8}{'learnt':>8}"]
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], len(ids)], strict=True)):
        role = processor.tokenizer.decode(ids[begin + 1 : min(end, begin + 32)]).split("\n")[0]
        lines.append(
            f"{number:>7}  {role:<10}{end - begin:>8}"
            f"{sum(token in visual for token in ids[begin:end]):>8}"
            f"{sum(label != IGNORED for label in labels[begin:end]):>8}"
        )
    learnt = sum(label != IGNORED for label in labels)
    lines.append(f"{'total':>7}  {'':<10}{len(ids):>8}{sum(token in visual for token in ids):>8}{learnt:>8}")
    return "\n".join(lines)
