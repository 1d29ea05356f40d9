"""VideoLLaMA3 for vLLM: its Transformers backend around our model, with our processing of media.

Prompts with one placeholder per medium, and the media, enter from vLLM; token ids, features and logits leave
to it. Scheduling, caches and sampling are vLLM's; reading media is left to `vllm_media.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature

from ..modeling.checkpoint_layouts import to_plugin_name
from ..modeling.document_attention import attend_as_transformers
from ..processing.media_requests import to_image_tensors, to_video_tensors
from ..processing.processing_videollama3 import VideoLlama3Processor
from ..processing.prompt_tokens import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from .vllm_media import Medium, RequestMedia, read_images, read_videos
from .vllm_plugin import check_version
from .vllm_prompt import PromptExpander

check_version()

from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.inputs import MultiModalFieldConfig  # noqa: E402
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems  # noqa: E402
from vllm.multimodal.processing import (  # noqa: E402
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo  # noqa: E402

# Frames of the clip that vLLM measures its memory with: few and large is the worst case for attention.
_DUMMY_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class RequestItem:
    """One medium and the request that it belongs to; None before the request is complete."""

    medium: Medium
    request: RequestMedia | None = None
    index: int = 0


class MediaItems(ProcessorBatchItems):
    """The images, or the videos, of a prompt."""

    def __init__(self, items: Sequence[RequestItem | None], modality: str) -> None:
        super().__init__(list(items), modality)

    def get_item_for_hash(self, index: int) -> object:
        """What vLLM's caches tell items apart by."""
        item = self.data[index]
        return None if item is None else item.medium.identity()


class MediaParser(MultiModalDataParser):
    """Keeps media as they came instead of decoding them."""

    def _parse_image_data(self, data: Any) -> MediaItems | None:
        return self._parse(data, "image")

    def _parse_video_data(self, data: Any) -> MediaItems | None:
        return self._parse(data, "video")

    def _parse(self, data: Any, modality: str) -> MediaItems | None:
        if data is None:
            return None
        if self.is_embeddings(data) or isinstance(data, dict):
            raise ValueError(f"Expected {modality}s as pictures, frames or files, got embeddings.")
        if isinstance(data, list) and data and all(isinstance(item, RequestItem) for item in data):
            return MediaItems(data, modality)
        media = read_images(data) if modality == "image" else read_videos(data)
        return MediaItems([None if medium is None else RequestItem(medium) for medium in media], modality)


@lru_cache(maxsize=4)
def _load_processor(name_or_path: str, revision: str | None) -> VideoLlama3Processor:
    return VideoLlama3Processor.from_pretrained(name_or_path, **({"revision": revision} if revision else {}))


class VideoLlama3ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model's inputs before it sees any."""

    def get_hf_processor(self, **kwargs: object) -> VideoLlama3Processor:
        """The checkpoint's processor; options of a request go into its calls, not into its making."""
        config = self.ctx.model_config
        return _load_processor(config.model, config.revision)

    def get_data_parser(self) -> MediaParser:
        """Reads `multi_modal_data`."""
        return MediaParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images and videos: they share one budget of tokens."""
        return {"image": None, "video": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Visual tokens of the largest image and video, before pruning."""
        processor = self.get_hf_processor()
        image, video = processor.image_processor, processor.video_processor
        return {
            "image": max(image.max_tokens, image.min_tokens),
            "video": max(video.max_tokens, video.min_tokens * video.max_frames),
        }


class VideoLlama3DummyInputs(BaseDummyInputsBuilder):
    """Media as large as they get, to measure memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One placeholder per medium."""
        return IMAGE_PLACEHOLDER * mm_counts.get("image", 0) + VIDEO_PLACEHOLDER * mm_counts.get("video", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """One image, or one clip of few frames, that fills the budget of visual tokens."""
        processor = self.info.get_hf_processor()
        num_frames = min(_DUMMY_FRAMES, processor.video_processor.max_frames)
        image_side = _side(processor.image_processor, 1)
        frame_side = _side(processor.video_processor, num_frames)
        return {
            "image": self._get_dummy_images(
                width=image_side,
                height=image_side,
                num_images=mm_counts.get("image", 0),
                overrides=mm_options.get("image"),
            ),
            "video": self._get_dummy_videos(
                width=frame_side,
                height=frame_side,
                num_frames=num_frames,
                num_videos=mm_counts.get("video", 0),
                overrides=mm_options.get("video"),
            ),
        }


def _side(pixel_processor: Any, num_frames: int) -> int:
    """Side in pixels of the square picture that takes its share of the budget."""
    tokens = max(pixel_processor.max_tokens // num_frames, 1)
    return math.isqrt(tokens) * int(pixel_processor.patch_size * pixel_processor.merge_size)


class VideoLlama3MediaProcessor(BaseMultiModalProcessor[VideoLlama3ProcessingInfo]):
    """Runs our processor on the media and puts their tokens into the prompt."""

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's, unpruned: its dummy clip stands still."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={"use_token_compression": False})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Processes one prompt; its media learn first of each other, since they share one budget."""
        items = [(modality, item) for modality, items in inputs.mm_data_items.items() for item in items.data]
        media = [item.medium for _, item in items if item is not None]
        options = self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs)
        request = RequestMedia(self.info.get_hf_processor(), media, options)
        bound: dict[str, list[RequestItem | None]] = {modality: [] for modality in inputs.mm_data_items}
        count = 0
        for modality, item in items:
            # None: known to vLLM's cache by an id that the client gave.
            bound[modality].append(None if item is None else RequestItem(item.medium, request, count))
            count += item is not None
        bound_items = MultiModalDataItems({name: MediaItems(row, name) for name, row in bound.items()})
        return super().apply(dataclasses.replace(inputs, mm_data_items=bound_items), timing_ctx)

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        named = {}
        for modality, hashes in super()._get_mm_hashes(inputs).items():
            sizes = [_changed_size(item) for item in inputs.mm_data_items[modality].data]
            named[modality] = [
                name if size is None else f"{name}-{size[0]}x{size[1]}"
                for name, size in zip(hashes, sizes, strict=True)
            ]
        return named

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        encoded = [
            item.request.encode(item.index) for items in mm_items.values() for item in items.data if item is not None
        ]
        data: dict[str, Any] = {**to_image_tensors(encoded), **to_video_tensors(encoded)}
        for name in ("pixel_values", "pixel_values_videos"):
            if name in data and data[name].is_floating_point():
                data[name] = data[name].to(self.info.ctx.model_config.dtype)
        for kind in ("image", "video"):
            rows = [torch.tensor(self._prompt.expansion(item)) for item in encoded if item.kind == kind]
            if rows:
                data[f"{kind}_prompt_ids"] = torch.cat(rows)
                data[f"{kind}_prompt_lengths"] = torch.tensor([len(row) for row in rows])
        return BatchFeature(data)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        fields = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels not in hf_inputs:
                continue
            patches = hf_inputs[f"{kind}_grid_thw"].prod(dim=1)
            fields[pixels] = MultiModalFieldConfig.flat_from_sizes(kind, patches)
            # Small, and read on the CPU to plan the encoder's work.
            for name in (f"{kind}_grid_thw", f"{kind}_merge_sizes"):
                fields[name] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
            lengths = hf_inputs.pop(f"{kind}_prompt_lengths")
            fields[f"{kind}_prompt_ids"] = MultiModalFieldConfig.flat_from_sizes(kind, lengths, keep_on_cpu=True)
            if kind == "video":
                tokens = patches // hf_inputs["video_merge_sizes"] ** 2
                fields["video_compression_mask"] = MultiModalFieldConfig.flat_from_sizes(
                    kind, tokens, keep_on_cpu=True
                )
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        updates = []
        for kind, items in out_mm_kwargs.items():
            token_id = self._prompt.placeholder_ids[kind]
            # Taken out: they are for the prompt, not for the model.
            expansions = [
                PromptUpdateDetails.select_token_id(item.pop(f"{kind}_prompt_ids").data.tolist(), token_id)
                for item in items
            ]
            updates.append(PromptReplacement(kind, [token_id], expansions.__getitem__))
        return updates

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Mapping[str, Any]
    ) -> tuple[list[int], dict[str, list[PlaceholderFeaturesInfo]]]:
        expansions = {
            kind: [alternatives[0].content.full for alternatives in updates]
            for kind, updates in mm_prompt_updates.items()
        }
        ids, places = self._prompt.expand(token_ids, expansions)
        infos: dict[str, list[PlaceholderFeaturesInfo]] = {}
        for kind, begin, tokens in places:
            rows = infos.setdefault(kind, [])
            is_embed = torch.tensor(tokens) == self._prompt.placeholder_ids[kind]
            rows.append(PlaceholderFeaturesInfo(kind, len(rows), begin, tokens, is_embed))
        return ids, infos

    @cached_property
    def _prompt(self) -> PromptExpander:
        return PromptExpander(self.info.get_hf_processor())


def _changed_size(item: RequestItem | None) -> tuple[int, int] | None:
    if item is None or item.request is None:
        return None
    return item.request.changed_sizes[item.index]


@MULTIMODAL_REGISTRY.register_processor(
    VideoLlama3MediaProcessor, info=VideoLlama3ProcessingInfo, dummy_inputs=VideoLlama3DummyInputs
)
class VideoLlama3ForVllm(TransformersMultiModalForCausalLM):
    """Our model inside vLLM; reads our layout and the official one."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The text that stands for one medium, for chat templates that take text only."""
        return {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}.get(modality)

    def recursive_replace(self) -> None:
        """Puts vLLM's layers in the place of the model's; called by vLLM when the model is built."""
        # vLLM puts its attention where it reads transformers' dispatch in a class's own forward pass.
        attend_as_transformers(self.model.language_model)
        super().recursive_replace()

    def _create_hf_to_vllm_mapper(self) -> None:
        # vLLM drops what a model ignores beside its own weights, and transformers hands that list of the encoder
        # (which may be read out of a whole model) on to the whole model: none of its weights would be loaded.
        self.model._keys_to_ignore_on_load_unexpected = None
        super()._create_hf_to_vllm_mapper()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Loads parameters under their names of any layout.

        Raises:
            ValueError: when one is missing (vLLM's own check leaves linear layers out).
        """
        loaded = super().load_weights((to_plugin_name(name), tensor) for name, tensor in weights)
        missing = sorted(name for name, _ in self.named_parameters() if name not in loaded)
        if missing and self.quant_config is None:
            raise ValueError(
                f"Expected a checkpoint with all {len(list(self.parameters()))} parameters of the model, got none for "
                f"{len(missing)}, the first being {missing[0]}: the checkpoint is incomplete."
            )
        return loaded

    def embed_multimodal(self, **media: Any) -> list[torch.Tensor]:
        """Features of the kept tokens of each image or video, (kept tokens, width)."""
        features: list[torch.Tensor] = []
        if media.get("pixel_values") is not None:
            inputs = [media[name] for name in ("pixel_values", "image_grid_thw", "image_merge_sizes")]
            features += self.model.get_image_features(*inputs, return_dict=True).pooler_output
        if media.get("pixel_values_videos") is not None:
            names = ("pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask")
            inputs = [media[name] for name in names]
            features += self.model.get_video_features(*inputs, return_dict=True).pooler_output
        return features
