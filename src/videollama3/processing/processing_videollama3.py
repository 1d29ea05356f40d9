"""The processor: conversations or texts with media -> everything that the model takes.

Conversations (transformers' or the authors' form) or texts with media enter; token ids, attention mask and
media tensors leave. It joins the parts of this folder and does little itself.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import cached_file

from .call_options import GENERATION_OPTIONS, IMAGE_SETTINGS, OPTIONS, VIDEO_SETTINGS, pick, read_options
from .conversations import Conversation, MediaReference, is_batch, read_conversation
from .encoded_prompt import EncodedPrompt
from .image_processing_videollama3 import VideoLlama3ImageProcessor
from .media_requests import (
    EncodedMedia,
    RequestEstimate,
    encode_request,
    estimate_request,
    to_image_tensors,
    to_video_tensors,
)
from .pixel_processor_videollama3 import PIXEL_LIMITS
from .planned_media import PlannedMedia, plan_image, plan_videos
from .prompt_tokens import (
    CHAT_TEMPLATE,
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    Piece,
    PromptTokenizer,
    template_variables,
    timestamp_text,
)
from .stream_messages import MAX_STREAM_FRAMES, check_timed_messages, first_frames, interleave, select_messages
from .text_placeholders import deal_out, media_of_texts
from .token_rows import batch_rows, truncate_row
from .video_processing_videollama3 import PER_VIDEO_OPTIONS, VideoLlama3VideoProcessor


class VideoLlama3Processor(ProcessorMixin):
    """Prepares images, videos and text for `VideoLlama3ForCausalLM`.

    Args:
        image_processor: a `VideoLlama3ImageProcessor`; the released models' settings by default.
        tokenizer: a fast Qwen2 tokenizer with `<|image_pad|>` and `<|video_pad|>`.
        video_processor: a `VideoLlama3VideoProcessor`; the released models' settings by default.
        chat_template: Jinja source; the released models' format by default.
    """

    _auto_class = "AutoProcessor"
    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer", "video_processor"]

    def __init__(
        self,
        image_processor: VideoLlama3ImageProcessor | None = None,
        tokenizer: Any = None,
        video_processor: VideoLlama3VideoProcessor | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        if tokenizer is None:
            raise ValueError("Expected a tokenizer, got None.")
        super().__init__(
            image_processor or VideoLlama3ImageProcessor(),
            tokenizer,
            video_processor or VideoLlama3VideoProcessor(),
            chat_template=chat_template or CHAT_TEMPLATE,
        )
        self.image_token = IMAGE_PLACEHOLDER
        self.video_token = VIDEO_PLACEHOLDER
        self.image_token_id = self._placeholder_id(IMAGE_PLACEHOLDER)
        self.video_token_id = self._placeholder_id(VIDEO_PLACEHOLDER)
        self._prompt_tokenizer: PromptTokenizer | None = None
        self._prompt_tokenizer_size = -1

    def _placeholder_id(self, token: str) -> int:
        token_id = self.tokenizer.get_vocab().get(token)
        if token_id is None:
            raise ValueError(
                f"Expected a tokenizer with the token {token!r}, as every Qwen2.5 tokenizer has, got one without: "
                f"add it with tokenizer.add_special_tokens."
            )
        return int(token_id)

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accepts our sub-processors: transformers' own check for a video processor needs torchvision."""
        if argument_name in ("image_processor", "video_processor"):
            if not hasattr(argument, "preprocess") or not hasattr(argument, "settings"):
                raise TypeError(
                    f"Expected {argument_name} as one of this package's image and video processors, "
                    f"got {type(argument).__name__}."
                )
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)

    # ------------------------------------------------------------------ loading and saving

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Builds the parts from a folder or repository of any layout, by our own classes."""
        trust_remote_code = kwargs.pop("trust_remote_code", None)
        if "num_frames" in kwargs:
            raise TypeError("Expected max_frames, got num_frames: videos are sampled by fps, up to max_frames.")
        own = {name: kwargs[name] for name in (*VideoLlama3VideoProcessor.fields, *PIXEL_LIMITS) if name in kwargs}
        hub = {name: value for name, value in kwargs.items() if name not in own}
        tokenizer = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, trust_remote_code=trust_remote_code, **hub
        )
        if "padding_side" not in hub:
            # Generation continues at the end of each row; the released tokenizers say right, and transformers'
            # pipelines pad as they say.
            tokenizer.padding_side = "left"
        # The official layout keeps sampling and merge sizes in its flat processor configuration.
        flat = processor_dict or {}
        for_images = (*VideoLlama3ImageProcessor.fields, *PIXEL_LIMITS)
        pixel = {name: value for name, value in own.items() if name in for_images}
        image_own = {**({"merge_size": flat["image_merge_size"]} if "image_merge_size" in flat else {}), **pixel}
        video_own = {
            **({"merge_size": flat["video_merge_size"]} if "video_merge_size" in flat else {}),
            **{name: flat[name] for name in ("fps", "max_frames") if flat.get(name) is not None},
            **_official_compression(pretrained_model_name_or_path, hub),
            **own,
        }
        image_processor = VideoLlama3ImageProcessor.from_pretrained(pretrained_model_name_or_path, **hub, **image_own)
        video_processor = VideoLlama3VideoProcessor.from_pretrained(pretrained_model_name_or_path, **hub, **video_own)
        return [image_processor, tokenizer, video_processor]

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are stored."""
        # The official class name: the name of this class is also one of transformers' own.
        return {**super().to_dict(), "processor_class": "Videollama3Qwen2Processor"}

    # ------------------------------------------------------------------ calls

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        conversation: Any = None,
        add_system_prompt: bool = False,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares texts with media, or a conversation.

        Args:
            images: with `text`: one image, a flat list in order of the placeholders, or a list per row.
            text: one prompt or a list, with one `<|image_pad|>` (or the authors' `<image>`) per image and
                one `<|video_pad|>` per video; placeholders are expanded here.
            videos: with `text`: one video, a flat list, or a list per row.
            conversation: instead of `text`: messages with content dicts, or a list of conversations.
            add_system_prompt: with `conversation`: put the released models' system prompt first.
            add_generation_prompt: with `conversation`: let the assistant speak next.
            chat_template: with `conversation`: another template than the processor's.
            kwargs: text options (`padding`, `padding_side`, `truncation`, `max_length`,
                `pad_to_multiple_of`, `return_tensors`, `return_mm_token_type_ids`,
                `return_assistant_tokens_mask`), video options (`fps`, `max_frames`, `start_time`,
                `end_time`, `timestamps`, `video_metadata`, `do_sample_frames`), settings of the image and
                video processors, and `max_visual_tokens`, `pixel_dtype`, `return_metadata`, `progress`.
                `images_kwargs`, `videos_kwargs` and `text_kwargs` may group them.

        Returns:
            `input_ids` and `attention_mask` (batch, sequence), and the media tensors, where there are media.
            Prompts that end with the assistant's header are padded on the left, others as the tokenizer says: on
            the left, too, where it was loaded with the processor and nothing else was asked for.

        Raises:
            ValueError: when media and placeholders do not match, or a medium cannot be read; the message
                names the item.
        """
        options = read_options(kwargs)
        if conversation is not None:
            if text is not None or images is not None or videos is not None:
                raise ValueError("Expected either `conversation` or `text` with `images` and `videos`, got both.")
            return self._process_conversations(
                conversation,
                options,
                chat_template=chat_template,
                add_system_prompt=add_system_prompt,
                add_generation_prompt=add_generation_prompt,
            )
        if text is None:
            raise ValueError(
                "Expected `text` or `conversation`, got neither (for media alone call image_processor or "
                "video_processor)."
            )
        return self._process_texts(text, images, videos, options)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = "auto",
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Renders conversations; with `tokenize=True` also reads their media.

        Args:
            conversation: messages with content dicts, or a list of conversations.
            chat_template: another template than the processor's, or the name of one.
            tools: handed to the template.
            documents: handed to the template.
            add_generation_prompt: let the assistant speak next.
            continue_final_message: leave the last message open.
            return_assistant_tokens_mask: also return `assistant_masks`, 1 on what the assistant says.
            tokenize: return ids instead of text.
            return_tensors: "pt" for tensors, None for lists; "auto": as `processor_kwargs` say, else lists.
            return_dict: with `tokenize`: everything the model takes, not the ids alone.
            processor_kwargs: options of `__call__`.
            kwargs: variables that the template reads (`add_system_prompt`), and options of `__call__`; those of
                `generate` are passed over.

        Returns:
            Text (a list for several conversations), ids, or a `BatchFeature`.

        Raises:
            TypeError: for a keyword that is neither.
            ValueError: as `__call__` does; when the assistant is to speak next and to go on with what it said.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("Expected either add_generation_prompt or continue_final_message, got both.")
        read = template_variables(self._template(chat_template))
        # `add_system_prompt` is ours: another template need not know it.
        variables = {key: value for key, value in kwargs.items() if key in read or key == "add_system_prompt"}
        # transformers' pipelines hand on what is meant for `generate`, too.
        ignored = set(variables) | (GENERATION_OPTIONS - OPTIONS)
        options = {**(processor_kwargs or {}), **{key: kwargs[key] for key in kwargs if key not in ignored}}
        variables.update(tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)
        variables["continue_final_message"] = continue_final_message
        if return_tensors != "auto":
            options["return_tensors"] = return_tensors
        if return_assistant_tokens_mask:
            options["return_assistant_tokens_mask"] = True
        options = read_options(options)
        if not tokenize:
            batch = conversation if is_batch(conversation) else [conversation]
            texts = [self._render(read_conversation(messages), chat_template, variables) for messages in batch]
            return texts if is_batch(conversation) else texts[0]
        features = self._process_conversations(conversation, options, chat_template=chat_template, **variables)
        if return_dict:
            return features
        ids = features["input_ids"]
        return ids if is_batch(conversation) or options.get("return_tensors") == "pt" else ids[0]

    def encode_conversation(
        self,
        conversation: Any,
        *,
        chat_template: str | None = None,
        add_system_prompt: bool = False,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> EncodedPrompt:
        """Prepares one conversation and leaves padding, packing and labels to the caller.

        Args:
            conversation: messages with content dicts.
            chat_template: another template than the processor's.
            add_system_prompt: put the released models' system prompt first.
            add_generation_prompt: let the assistant speak next.
            kwargs: options of `__call__` on media.

        Returns:
            Token ids, the masks that grew with them, and the encoded media.
        """
        (row,), options = deal_out([read_conversation(conversation)], read_options(kwargs))
        variables = {"add_system_prompt": add_system_prompt, "add_generation_prompt": add_generation_prompt}
        pieces = self._pieces(row, chat_template, variables)
        media = self._encode_media(row.media, options, "")
        return EncodedPrompt(self._prompts.tokenize(self._expand(pieces, media)), media)

    def encode_stream(
        self,
        video: Any,
        messages: Any,
        *,
        start_time: float | None = None,
        end_time: float | None = None,
        max_frames: int = MAX_STREAM_FRAMES,
        chat_template: str | None = None,
        add_system_prompt: bool = False,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> EncodedPrompt:
        """Prepares a conversation about a video that runs meanwhile.

        The frames up to each message's time come before it, each as a `stream` message of its own, labelled with
        the seconds since `start_time`; they are one video, and each is pruned against the frame before it
        whatever was said between them. Frames after the last message are not read.

        Args:
            video: one video, as in a content dict.
            messages: dicts with `role`, `content` (text only) and `time` in seconds of the video.
            start_time: beginning of the window in seconds of the video.
            end_time: end of the window.
            max_frames: later frames, and messages from the first of them on, are dropped.
            chat_template: another template than the processor's.
            add_system_prompt: put the released models' system prompt first.
            add_generation_prompt: let the assistant speak next.
            kwargs: options of `__call__` on media.

        Returns:
            Token ids, the masks that grew with them, and the video.

        Raises:
            TypeError: for messages without times.
            ValueError: for messages out of order or with media of their own, where no frame or no message is left, and
                for a tokenizer without the tokens of a stream.
        """
        self._prompts.require_stream_tokens()
        options = read_options({**kwargs, "start_time": start_time, "end_time": end_time})
        timed = check_timed_messages(messages)
        if read_conversation(timed).media:
            raise ValueError("Expected messages of a stream with text only, got one with an image or a video.")
        # All ticks are planned, since the limit drops the last ones instead of spreading over the whole.
        reference = MediaReference("video", video, {"max_frames": sys.maxsize}, "video")
        (planned,) = self._plan_media([reference], options, "")
        assert planned.timestamps is not None
        timed, count = select_messages(planned.timestamps.tolist(), timed, max_frames=max_frames)
        (encoded,) = self._encode_planned([first_frames(planned, count)], options)
        assert encoded.timestamps is not None
        shown = interleave(encoded.timestamps.tolist(), timed, start_time=start_time or 0.0)
        variables = {"add_system_prompt": add_system_prompt, "add_generation_prompt": add_generation_prompt}
        frames = [MediaReference("image", None, {}, "frame")] * encoded.grid_thw[0]
        pieces = self._pieces(Conversation(shown, frames), chat_template, variables)
        return EncodedPrompt(self._prompts.tokenize(self._expand_frames(pieces, encoded)), [encoded])

    def estimate(self, conversation: Any, **kwargs: Any) -> RequestEstimate:
        """Says what a conversation will cost before pruning, without decoding its videos.

        Args:
            conversation: messages with content dicts.
            kwargs: options of `__call__`.

        Returns:
            Frames, sizes, patches, visual tokens and bytes of pixels, per image or video and in all.
        """
        (row,), options = deal_out([read_conversation(conversation)], read_options(kwargs))
        return self._estimate_planned(self._plan_media(row.media, options, ""), options)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decodes what `generate` returned, (batch, sequence) ids, to one text per row."""
        decoded: list[str] = self.tokenizer.batch_decode(
            generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
        )
        return decoded

    @property
    def model_input_names(self) -> list[str]:
        """Names of everything that `__call__` may return for the model."""
        names = [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            *self.video_processor.model_input_names,
        ]
        return list(dict.fromkeys(name for name in names if name != "token_type_ids"))

    # ------------------------------------------------------------------ what engines ask

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that stands for image `image_idx` in an expanded prompt."""
        merge = int(image_inputs["image_merge_sizes"][image_idx])
        return self.image_token * (int(torch.as_tensor(image_inputs["image_grid_thw"][image_idx]).prod()) // merge**2)

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """The text that stands for video `video_idx` in an expanded prompt: times and kept tokens."""
        grids = torch.as_tensor(video_inputs["video_grid_thw"])
        counts = (grids.prod(dim=1) // torch.as_tensor(video_inputs["video_merge_sizes"]) ** 2).tolist()
        mask = torch.as_tensor(video_inputs["video_compression_mask"]).split(counts)[video_idx]
        metadata = video_inputs["video_metadata"][video_idx]
        frames = mask.view(int(grids[video_idx, 0]), -1).sum(dim=1).tolist()
        return ",".join(
            f"Time {timestamp_text(seconds)}s:" + self.video_token * count
            for seconds, count in zip(metadata.timestamps, frames, strict=True)
        )

    def _get_num_multimodal_tokens(
        self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any
    ) -> MultiModalData:
        """Numbers of tokens and patches from sizes alone, each item alone in its request, before pruning.

        Args:
            image_sizes: (height, width) in pixels of each image.
            video_sizes: (frames, height, width) of each video.
            kwargs: settings of the image and video processors.
        """
        data: dict[str, list[int]] = {}
        if image_sizes is not None:
            merge = kwargs.get("merge_size") or self.image_processor.merge_size
            patches = [self.image_processor.get_number_of_image_patches(*size, kwargs) for size in image_sizes]
            data["num_image_patches"] = patches
            data["num_image_tokens"] = [count // merge**2 for count in patches]
        if video_sizes is not None:
            merge = kwargs.get("merge_size") or self.video_processor.merge_size
            data["num_video_tokens"] = [
                self.video_processor.get_num_of_video_patches(*size, kwargs) // merge**2 for size in video_sizes
            ]
        return MultiModalData(**data)

    # ------------------------------------------------------------------ inside

    @property
    def _prompts(self) -> PromptTokenizer:
        if self._prompt_tokenizer is None or self._prompt_tokenizer_size != len(self.tokenizer):
            self._prompt_tokenizer = PromptTokenizer(
                self.tokenizer, image_token_id=self.image_token_id, video_token_id=self.video_token_id
            )
            self._prompt_tokenizer_size = len(self.tokenizer)
        return self._prompt_tokenizer

    def _render(self, conversation: Conversation, chat_template: str | None, variables: dict[str, Any]) -> str:
        """Text of a conversation with one placeholder per medium."""
        rendered, mark = self._prompts.render(conversation.messages, self._template(chat_template), **variables)
        pieces = self._prompts.split(rendered, mark)
        media = iter(conversation.media)
        self._check_count(pieces, conversation.media)
        texts = []
        for piece in pieces:
            if piece.token_id is not None and piece.text in self._prompts.placeholders:
                texts.append(self.image_token if next(media).kind == "image" else self.video_token)
            else:
                texts.append(piece.text)
        return "".join(texts)

    def _template(self, chat_template: str | None) -> str:
        stored = self.chat_template
        if isinstance(stored, dict):
            name = chat_template if chat_template in stored else "default"
            if chat_template is None or chat_template in stored:
                if name not in stored:
                    raise ValueError(f"Expected the name of one of the chat templates {sorted(stored)}, got None.")
                return stored[name]
        return chat_template or stored or CHAT_TEMPLATE

    def _process_conversations(
        self, conversation: Any, options: dict[str, Any], *, chat_template: str | None, **variables: Any
    ) -> BatchFeature:
        batch = [
            read_conversation(messages) for messages in (conversation if is_batch(conversation) else [conversation])
        ]
        batch, options = deal_out(batch, options)
        rows = []
        media: list[EncodedMedia] = []
        # Prompts first: a broken template or part shows before minutes of decoding.
        rendered = []
        for row in batch:
            rendered.append(self._pieces(row, chat_template, variables))
        for i, (row, pieces) in enumerate(zip(batch, rendered, strict=True)):
            prefix = f"row {i}, " if len(batch) > 1 else ""
            encoded = self._encode_media(row.media, options, prefix)
            media += encoded
            rows.append(self._expand(pieces, encoded))
        goes_on = bool(variables.get("continue_final_message"))
        return self._finish(rows, media, options, goes_on=goes_on)

    def _pieces(self, row: Conversation, chat_template: str | None, variables: dict[str, Any]) -> list[Piece]:
        """The rendered prompt, cut at its control tokens, with one placeholder per medium."""
        text, mark = self._prompts.render(row.messages, self._template(chat_template), **variables)
        pieces = self._prompts.split(text, mark)
        self._check_count(pieces, row.media)
        return pieces

    def _check_count(self, pieces: list[Piece], media: Sequence[Any]) -> None:
        count = sum(piece.token_id is not None and piece.text in self._prompts.placeholders for piece in pieces)
        if count != len(media):
            raise ValueError(
                f"Expected a chat template that writes one placeholder for each of the {len(media)} media of the "
                f"conversation, got {count} (a message whose role or content the template leaves out?)."
            )

    def _process_texts(
        self, text: str | Sequence[str], images: Any, videos: Any, options: dict[str, Any]
    ) -> BatchFeature:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(item, str) for item in texts):
            raise TypeError(f"Expected `text` as a string or a non-empty list of strings, got {text!r:.80}.")
        rows = [self._prompts.split(item) for item in texts]
        references, shared = media_of_texts(
            rows, images=images, videos=videos, options=options, placeholders=self._prompts.placeholders
        )
        media: list[EncodedMedia] = []
        expanded = []
        for row, own in zip(rows, references, strict=True):
            encoded = self._encode_media(own, shared, "")
            media += encoded
            expanded.append(self._expand(row, encoded))
        return self._finish(expanded, media, options)

    def _encode_media(
        self, references: Sequence[MediaReference], options: dict[str, Any], prefix: str
    ) -> list[EncodedMedia]:
        """Plans, reads and prunes the media of one request."""
        return self._encode_planned(self._plan_media(references, options, prefix), options)

    def _encode_planned(self, planned: Sequence[PlannedMedia], options: dict[str, Any]) -> list[EncodedMedia]:
        return encode_request(
            planned,
            image=self.image_processor.settings(**pick(options, IMAGE_SETTINGS, "image_")),
            video=self.video_processor.settings(**pick(options, VIDEO_SETTINGS, "video_")),
            max_visual_tokens=options.get("max_visual_tokens"),
            pixel_dtype=options.get("pixel_dtype", self.image_processor.pixel_dtype),
            progress=options.get("progress"),
        )

    def _estimate_planned(self, planned: Sequence[PlannedMedia], options: dict[str, Any]) -> RequestEstimate:
        return estimate_request(
            planned,
            image=self.image_processor.settings(**pick(options, IMAGE_SETTINGS, "image_")),
            video=self.video_processor.settings(**pick(options, VIDEO_SETTINGS, "video_")),
            max_visual_tokens=options.get("max_visual_tokens"),
        )

    def _plan_media(
        self, references: Sequence[MediaReference], options: dict[str, Any], prefix: str
    ) -> list[PlannedMedia]:
        planned: list[PlannedMedia | None] = []
        videos = []
        shared = {key: options[key] for key in PER_VIDEO_OPTIONS if key in options and key != "max_visual_tokens"}
        for reference in references:
            name = f"{prefix}{reference.where}"
            if reference.source is None:
                raise ValueError(
                    f"Expected {name} with its {reference.kind}, got a placeholder only: give a source (`path`, "
                    f"`url`, `{reference.kind}`), or render with tokenize=False and pass "
                    f"{reference.kind}s with the text."
                )
            if reference.kind == "image":
                planned.append(plan_image(reference.source, name=f"{name} (image)" if "part" in name else name))
            else:
                planned.append(None)
                own = {key: value for key, value in reference.options.items() if value is not None}
                option = self.video_processor.options(**{**shared, **own})
                videos.append((reference.source, option, f"{name} (video)" if "part" in name else name))
        clips = iter(plan_videos(*zip(*videos, strict=True)) if videos else [])
        return [item if item is not None else next(clips) for item in planned]

    def _expand(self, pieces: list[Piece], media: list[EncodedMedia]) -> list[Piece]:
        items = iter(media)
        expanded: list[Piece] = []
        for piece in pieces:
            if piece.token_id is None or piece.text not in self._prompts.placeholders:
                expanded.append(piece)
                continue
            item = next(items)
            if item.kind == "image":
                expanded += self._prompts.image_pieces(len(item.keep))
            else:
                assert item.timestamps is not None
                expanded += self._prompts.video_pieces(item.timestamps.tolist(), item.kept_per_frame)
        return expanded

    def _expand_frames(self, pieces: list[Piece], video: EncodedMedia) -> list[Piece]:
        """Puts the kept tokens of one frame of a video for each placeholder; its time stands in the prompt."""
        counts = iter(video.kept_per_frame)
        return [
            Piece(VIDEO_PLACEHOLDER, self.video_token_id, next(counts))
            if piece.token_id is not None and piece.text in self._prompts.placeholders
            else piece
            for piece in pieces
        ]

    def _finish(
        self, rows: list[list[Piece]], media: list[EncodedMedia], options: dict[str, Any], *, goes_on: bool = False
    ) -> BatchFeature:
        limit = None
        if options.get("truncation", "do_not_truncate") not in (False, "do_not_truncate"):
            limit = options.get("max_length") or self.tokenizer.model_max_length
        kinds = {self.image_token_id: 1, self.video_token_id: 2}
        prompts = [
            truncate_row(
                self._prompts.tokenize(row),
                row=i,
                limit=limit,
                placeholders=kinds,
                side=self.tokenizer.truncation_side,
            )
            for i, row in enumerate(rows)
        ]
        side = options.get("padding_side")
        if side is None and (goes_on or all(self._prompts.ends_with_generation_prompt(row) for row in rows)):
            # Generation continues at the end of each row.
            side = "left"
        data = batch_rows(
            prompts,
            pad_token_id=self.tokenizer.pad_token_id,
            padding_side=side or self.tokenizer.padding_side,
            kinds=kinds,
            options=options,
        )
        data.update(to_image_tensors(media))
        data.update(to_video_tensors(media))
        if options.get("return_metadata"):
            data["video_metadata"] = [item.metadata for item in media if item.kind == "video"]
        return BatchFeature(data)


def _official_compression(name_or_path: Any, hub: dict[str, Any]) -> dict[str, Any]:
    """Whether an official checkpoint prunes: its model configuration says so."""
    arguments = {
        key: value
        for key, value in hub.items()
        if key in ("cache_dir", "token", "revision", "local_files_only", "subfolder")
    }
    path = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **arguments)
    if path is None or not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("use_token_compression") is None:
        return {}
    return {"use_token_compression": bool(config["use_token_compression"])}
