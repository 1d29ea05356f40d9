"""Tokenized prompts with one placeholder per medium -> the token ids that our processor gives.

Token ids and encoded media enter; longer token ids leave, and where the media stand in them. What an engine
makes of it is left to `vllm_model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..processing.media_requests import EncodedMedia
from ..processing.processing_videollama3 import VideoLlama3Processor


class PromptExpander:
    """Puts the tokens of media into tokenized prompts, so that the ids are those of our processor.

    Args:
        processor: of the checkpoint.
    """

    def __init__(self, processor: VideoLlama3Processor) -> None:
        self.processor = processor
        self.placeholder_ids = {"image": processor.image_token_id, "video": processor.video_token_id}
        self._kinds = {token_id: kind for kind, token_id in self.placeholder_ids.items()}
        self._control_ids = set(processor._prompts.control_ids.values())

    def expansion(self, item: EncodedMedia) -> list[int]:
        """Token ids that one encoded medium becomes: `Time 0.0s:` and kept tokens of each frame."""
        prompts = self.processor._prompts
        if item.kind == "image":
            return prompts.tokenize(prompts.image_pieces(len(item.keep))).input_ids
        assert item.timestamps is not None
        return prompts.tokenize(prompts.video_pieces(item.timestamps.tolist(), item.kept_per_frame)).input_ids

    def expand(
        self, token_ids: Sequence[int], expansions: Mapping[str, Sequence[list[int]]]
    ) -> tuple[list[int], list[tuple[str, int, list[int]]]]:
        """Replaces each placeholder by its medium's tokens.

        Args:
            token_ids: a prompt with one placeholder per medium.
            expansions: for image and video, the token ids of each item.

        Returns:
            The prompt, and for each medium its kind, where its first visual token stands, and its tokens from
            there on (the times of later frames among them).

        Raises:
            ValueError: when placeholders and media differ in number.
        """
        for kind, token_id in self.placeholder_ids.items():
            found, wanted = list(token_ids).count(token_id), len(expansions.get(kind, ()))
            if found != wanted:
                raise ValueError(
                    f"Expected one {kind} for each placeholder (id {token_id}) in the prompt, got {found} "
                    f"placeholder(s) and {wanted} {kind}(s)."
                )
        rest = {kind: iter(rows) for kind, rows in expansions.items()}
        ids: list[int] = []
        places = []
        for token_id in token_ids:
            if token_id not in self._kinds:
                ids.append(token_id)
                continue
            kind = self._kinds[token_id]
            tokens = next(rest[kind])
            first = tokens.index(token_id)
            ids = self._append_text(ids, tokens[:first])
            places.append((kind, len(ids), tokens[first:]))
            ids += tokens[first:]
        return ids, places

    def _append_text(self, ids: list[int], label: list[int]) -> list[int]:
        """Adds the time of a video's first frame: one text with what stands before it, and so tokenized as one."""
        begin = len(ids)
        while begin and ids[begin - 1] not in self._control_ids:
            begin -= 1
        if not label or begin == len(ids):
            return ids + label
        text = self._decode(ids[begin:])
        if self._encode(text) != ids[begin:]:
            # Tokens of the client's own, which are left as they are.
            return ids + label
        return ids[:begin] + self._encode(text + self._decode(label))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str) -> list[int]:
        return self.processor._prompts._encode([text])[0][0]
