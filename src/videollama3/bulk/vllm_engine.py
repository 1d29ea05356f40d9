"""vLLM's offline engine as an engine of `videollama3 batch`; imported only when it is asked for.

Rows that the decoding processes have read enter, texts leave. vLLM gets the sampled frames at their final size, so
that it decodes nothing; which rows go together is left to `token_batches.py`, the plugin itself to
`serving/vllm_model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..contact_sheet import frames_from_patches
from ..processing.conversations import read_conversation
from ..processing.media_requests import EncodedMedia
from ..processing.prompt_tokens import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Piece
from .engines import Answer, EngineSettings, Refusal
from .row_reader import ReadRow, RowReader


class VllmEngine:
    """Greedy answers of `vllm.LLM`.

    Args:
        settings: model, dtype, length of answers, and arguments of `vllm.LLM`.
        reader: what the rows were read with.

    Raises:
        ImportError: where vLLM is not installed.
    """

    def __init__(self, settings: EngineSettings, reader: RowReader) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError(
                "Expected vLLM for --engine vllm, found none: pip install 'videollama3[vllm]'; see docs/serving.md."
            ) from error
        self._reader = reader
        self._llm = LLM(settings.model, dtype=settings.dtype, **settings.vllm_options)
        self._sampling = SamplingParams(temperature=0, max_tokens=settings.max_new_tokens)
        self._max_prompt_tokens = self._llm.model_config.max_model_len - 1

    def answer(self, rows: Sequence[ReadRow]) -> list[Answer | Refusal]:
        """One answer per row, in their order."""
        fitting = [row for row in rows if len(row.prompt.prompt.input_ids) <= self._max_prompt_tokens]
        requests = [self._request(row) for row in fitting]
        outputs = iter(self._llm.generate(requests, self._sampling, use_tqdm=False) if requests else [])
        fits = {id(row) for row in fitting}
        return [self._answer(row, next(outputs)) if id(row) in fits else self._too_long(row) for row in rows]

    def _too_long(self, row: ReadRow) -> Refusal:
        return Refusal(
            f"Expected a prompt of at most {self._max_prompt_tokens} tokens, got {len(row.prompt.prompt.input_ids)}: "
            "raise max_model_len in --vllm-options, or lower --max-frames or --max-visual-tokens."
        )

    def _request(self, row: ReadRow) -> dict[str, Any]:
        media: dict[str, list[Any]] = {}
        for item in row.prompt.media:
            media.setdefault(item.kind, []).append(_frames(item))
        request: dict[str, Any] = {"prompt_token_ids": self._unexpanded(row)}
        if media:
            prune = {} if self._reader.prune is None else {"use_token_compression": self._reader.prune}
            request["multi_modal_data"] = media
            # Pictures have their size already.
            request["mm_processor_kwargs"] = {"do_resize": False, **prune}
        return request

    def _unexpanded(self, row: ReadRow) -> list[int]:
        """The prompt with one placeholder per medium; what a user wrote stays text."""
        processor = self._reader.processor
        variables = {"add_system_prompt": self._reader.system_prompt, "add_generation_prompt": True}
        pieces = processor._pieces(read_conversation(row.row.messages), None, variables)
        media = iter(row.prompt.media)
        ids: list[int] = processor._prompts.tokenize(
            [
                _placeholder(next(media), processor)
                if piece.token_id is not None and piece.text in processor._prompts.placeholders
                else piece
                for piece in pieces
            ]
        ).input_ids
        return ids

    def _answer(self, row: ReadRow, output: Any) -> Answer | Refusal:
        if list(output.prompt_token_ids) != row.prompt.prompt.input_ids:
            # Never seen; an answer to another prompt is none.
            return Refusal("vLLM expanded this prompt to other tokens than the processor: use --engine transformers.")
        (completion,) = output.outputs
        ids = list(completion.token_ids)
        # Not vLLM's own text, which leaves out bytes at the end that are no whole character.
        text: str = self._reader.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, len(ids), finished=completion.finish_reason == "stop")


def _placeholder(item: EncodedMedia, processor: Any) -> Piece:
    if item.kind == "image":
        return Piece(IMAGE_PLACEHOLDER, processor.image_token_id)
    return Piece(VIDEO_PLACEHOLDER, processor.video_token_id)


def _frames(item: EncodedMedia) -> Any:
    """A picture, or frames with their times, as `serving/vllm_media.py` takes them."""
    assert item.patches.dtype == "uint8"
    frames = frames_from_patches(item.patches, item.grid_thw, item.merge_size)  # type: ignore[arg-type]
    if item.timestamps is None:
        return frames[0]
    return frames, {"timestamps": item.timestamps.tolist(), "max_frames": len(frames)}
