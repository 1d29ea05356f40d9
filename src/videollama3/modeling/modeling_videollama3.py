"""The whole model: visual tokens take the place of their placeholders, Qwen2 answers.

Processor tensors enter, logits or a loss leave. Encoding pixels is left to
`vision_encoder_videollama3.py`, loss arithmetic to `supervised_loss.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Model
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple

from .cached_media import media_after_cache
from .configuration_videollama3 import VideoLlama3Config
from .document_attention import attend_by_document
from .packed_documents import keep_documents_apart
from .pretrained_videollama3 import VideoLlama3PreTrainedModel
from .supervised_loss import supervised_loss
from .vision_encoder_videollama3 import VideoLlama3VisionModel

# Inputs that describe media: their first dimension is not the batch, and only the prompt needs them.
MEDIA_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "image_merge_sizes",
    "pixel_values_videos",
    "video_grid_thw",
    "video_merge_sizes",
    "video_compression_mask",
)


@dataclasses.dataclass
class VideoLlama3ModelOutputWithPast(ModelOutput):
    """Output of `VideoLlama3Model`.

    Attributes:
        last_hidden_state: (batch, sequence, width).
        past_key_values: the cache, when one is used.
        hidden_states: every layer's states, on request.
        attentions: every layer's attention weights, on request.
        image_hidden_states: (image tokens, width), projected features of all images.
        video_hidden_states: (kept video tokens, width), projected features of all videos.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


@dataclasses.dataclass
class VideoLlama3CausalLMOutputWithPast(ModelOutput):
    """Output of `VideoLlama3ForCausalLM`.

    Attributes:
        loss: scalar, when labels are given.
        logits: (batch, kept positions, vocabulary); None in training mode with labels, where only the
            logits of supervised positions are computed, inside the loss.
        past_key_values: the cache, when one is used.
        hidden_states: every layer's states, on request.
        attentions: every layer's attention weights, on request.
        image_hidden_states: (image tokens, width), projected features of all images.
        video_hidden_states: (kept video tokens, width), projected features of all videos.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    video_hidden_states: torch.Tensor | None = None


class VideoLlama3Projector(nn.Module):
    """Two linear layers from the encoder's width to the language model's."""

    def __init__(self, config: VideoLlama3Config) -> None:
        super().__init__()
        self.readout = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size),
            nn.GELU(),
            nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(tokens, encoder width) -> (tokens, language model width)."""
        return self.readout(features)


class VideoLlama3Model(VideoLlama3PreTrainedModel):
    """Vision encoder, projector and language model, without the head."""

    _auto_class = "AutoModel"
    _auto_classes = {"AutoModel": "VideoLlama3Model"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\b"]  # noqa: RUF012

    def __init__(self, config: VideoLlama3Config) -> None:
        super().__init__(config)
        self.vision_model = VideoLlama3VisionModel(config.vision_config)
        self.projector = VideoLlama3Projector(config)
        self.language_model = Qwen2Model(config.text_config)
        attend_by_document(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor,
        image_merge_sizes: torch.Tensor,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Projected features of images.

        Args:
            pixel_values: (patches of all images, 588).
            image_grid_thw: int64 (images, 3), in patches.
            image_merge_sizes: int64 (images,).
            kwargs: `return_dict`.

        Returns:
            `pooler_output`: a list, one (visual tokens, language width) tensor per image;
            `last_hidden_state`: (visual tokens of all images, encoder width).
        """
        return self._visual_features(pixel_values, image_grid_thw, image_merge_sizes, None)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor,
        video_merge_sizes: torch.Tensor,
        video_compression_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Projected features of the kept tokens of videos: as many rows as placeholders.

        Args:
            pixel_values_videos: (patches of all videos, 588).
            video_grid_thw: int64 (videos, 3), frames, rows and columns in patches.
            video_merge_sizes: int64 (videos,).
            video_compression_mask: bool (visual tokens of all videos,), True = kept; None keeps all.
            kwargs: `return_dict`.

        Returns:
            `pooler_output`: a list, one (kept tokens, language width) tensor per video;
            `last_hidden_state`: (kept tokens of all videos, encoder width).
        """
        return self._visual_features(pixel_values_videos, video_grid_thw, video_merge_sizes, video_compression_mask)

    def _visual_features(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor,
        merge_sizes: torch.Tensor,
        keep: torch.Tensor | None,
    ) -> BaseModelOutputWithPooling:
        if grid_thw is None or merge_sizes is None:
            raise ValueError(
                "Expected grids and merge sizes together with pixel values, got None: pass all of the processor's "
                "tensors on."
            )
        encoded = self.vision_model(
            pixel_values=pixel_values, grid_thw=grid_thw, merge_sizes=merge_sizes, return_dict=True
        ).last_hidden_state
        counts = (grid_thw.prod(dim=1) // merge_sizes**2).tolist()
        if keep is not None:
            if keep.dtype != torch.bool or keep.shape != encoded.shape[:1]:
                raise ValueError(
                    f"Expected video_compression_mask as bool of shape ({encoded.shape[0]},), one entry per "
                    f"visual token before pruning, got {keep.dtype} of shape {tuple(keep.shape)}."
                )
            keep = keep.to(encoded.device)
            encoded = encoded[keep]
            counts = torch.stack([part.sum() for part in keep.split(counts)]).tolist()
        features = self.projector(encoded)
        return BaseModelOutputWithPooling(last_hidden_state=encoded, pooler_output=list(features.split(counts)))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        image_merge_sizes: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_merge_sizes: torch.Tensor | None = None,
        video_compression_mask: torch.Tensor | None = None,
        media_expand_size: int = 1,
        num_candidates: int = 0,
        **kwargs: Any,
    ) -> VideoLlama3ModelOutputWithPast:
        """Runs the model up to the last hidden state.

        Args:
            input_ids: int64 (batch, sequence), with one placeholder per kept visual token.
            attention_mask: int64 (batch, sequence), 0 at padding.
            position_ids: int64 (batch, sequence). Where they restart, a further document begins that sees
                nothing of those before it in its row; positions may leave some out.
            past_key_values: cache to read and extend.
            inputs_embeds: (batch, sequence, width) instead of `input_ids`; with media, their placeholders are found by
                their embedding.
            use_cache: whether to return a cache; None: as the configuration says, but not where documents are packed,
                and not inside a compiled graph that was given positions, which cannot tell whether they restart.
            pixel_values: (patches of all images, 588), float or uint8.
            image_grid_thw: int64 (images, 3).
            image_merge_sizes: int64 (images,).
            pixel_values_videos: (patches of all videos, 588), float or uint8.
            video_grid_thw: int64 (videos, 3).
            video_merge_sizes: int64 (videos,).
            video_compression_mask: bool (visual tokens of all videos,), True = kept.
            media_expand_size: every row of `input_ids` stands this many times in a row while its media are
                given once (beam search, several return sequences).
            num_candidates: last tokens that are only proposed (assisted generation): placeholders among them are
                read as text where those before them have all the features.
            kwargs: handed to the language model; among them `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
                `max_length_k`, the bounds of documents for kernels of packed sequences.

        Raises:
            ValueError: when placeholders and features do not match in number; when documents are packed and a
                cache is asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        image_features = video_features = None
        if pixel_values is not None:
            image = self.get_image_features(pixel_values, image_grid_thw, image_merge_sizes, return_dict=True)
            image_features = torch.cat(image.pooler_output)
        if pixel_values_videos is not None:
            video = self.get_video_features(
                pixel_values_videos, video_grid_thw, video_merge_sizes, video_compression_mask, return_dict=True
            )
            video_features = torch.cat(video.pooler_output)
        # A step of decoding is not looked at: that would wait for the device at every token.
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        is_step = past_key_values is not None and given.shape[1] == 1
        # Without a cache `generate` comes with its answer, too, in which the model may say anything.
        is_start = not (is_step or use_cache is False or torch.compiler.is_compiling()) and (
            past_key_values is None or past_key_values.get_seq_length() == 0
        )
        inputs_embeds = self._embed(
            input_ids,
            inputs_embeds,
            image_features,
            video_features,
            media_expand_size,
            num_candidates=num_candidates,
            is_start=is_start,
        )
        mask: Any = attention_mask
        if not is_step:
            mask, position_ids, use_cache, kwargs = keep_documents_apart(
                self.language_model, inputs_embeds, position_ids, attention_mask, past_key_values, use_cache, kwargs
            )
        outputs = self.language_model(
            input_ids=None,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return VideoLlama3ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            video_hidden_states=video_features,
        )

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        image_features: torch.Tensor | None,
        video_features: torch.Tensor | None,
        expand_size: int,
        *,
        num_candidates: int,
        is_start: bool,
    ) -> torch.Tensor:
        """Token embeddings with features in the place of their placeholders: (batch, sequence, width)."""
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        for name, features, token_id in (
            ("image", image_features, self.config.image_token_id),
            ("video", video_features, self.config.video_token_id),
        ):
            if features is not None:
                where = self._places_of(token_id, input_ids, embeds)
                if num_candidates and int(where[::expand_size].sum()) != features.shape[0]:
                    where[:, -num_candidates:] = False
                _check_counts(where[::expand_size], features, name=name, token_id=token_id)
                features = _expand(features, where, expand_size).to(embeds.device, embeds.dtype)
                embeds = embeds.masked_scatter(where.unsqueeze(-1).to(embeds.device), features)
            elif is_start and input_ids is not None:
                given = input_ids[:, : input_ids.shape[1] - num_candidates]
                _check_no_placeholders(given, name=name, token_id=token_id)
        return embeds

    def _places_of(self, token_id: int, input_ids: torch.Tensor | None, embeds: torch.Tensor) -> torch.Tensor:
        """Where a placeholder stands: bool (batch, sequence); by its embedding, where that is all there is."""
        if input_ids is not None:
            return input_ids == token_id
        token = torch.tensor(token_id, device=embeds.device)
        return (embeds == self.get_input_embeddings()(token)).all(dim=-1)


def _check_counts(where: torch.Tensor, features: torch.Tensor, *, name: str, token_id: int) -> None:
    num_placeholders = int(where.sum())
    if num_placeholders != features.shape[0]:
        raise ValueError(
            f"Expected as many {name} placeholders (id {token_id}) in input_ids as {name} features, got "
            f"{num_placeholders} placeholders and {features.shape[0]} features: input_ids were cut, or belong "
            "to other media or to another pruning mask."
        )


def _check_no_placeholders(input_ids: torch.Tensor, *, name: str, token_id: int) -> None:
    num_placeholders = int((input_ids == token_id).sum())
    if num_placeholders:
        raise ValueError(
            f"Expected {name} pixels together with the {num_placeholders} {name} placeholders (id {token_id}) in "
            "input_ids, got none: pass all of the processor's tensors on."
        )


def _expand(features: torch.Tensor, where: torch.Tensor, expand_size: int) -> torch.Tensor:
    """Repeats each prompt's features for its `expand_size` rows; the rows differ after the prompt (beams)."""
    if expand_size == 1:
        return features
    per_prompt = features.split(where[::expand_size].sum(dim=1).tolist())
    return torch.cat([part.repeat(expand_size, 1) for part in per_prompt])


class VideoLlama3ForCausalLM(VideoLlama3PreTrainedModel, GenerationMixin):
    """VideoLLaMA3 with its language modelling head; `generate` returns prompt and new tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _auto_class = "AutoModelForCausalLM"
    _auto_classes = {  # noqa: RUF012
        "AutoModel": "VideoLlama3Model",
        "AutoModelForCausalLM": "VideoLlama3ForCausalLM",
        "AutoModelForImageTextToText": "VideoLlama3ForCausalLM",
        "AutoModelForMultimodalLM": "VideoLlama3ForCausalLM",
    }
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: VideoLlama3Config) -> None:
        super().__init__(config)
        self.model = VideoLlama3Model(config)
        self.lm_head: nn.Module = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head."""
        self.lm_head = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.Tensor,
        image_merge_sizes: torch.Tensor,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See `VideoLlama3Model.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_grid_thw, image_merge_sizes, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_grid_thw: torch.Tensor,
        video_merge_sizes: torch.Tensor,
        video_compression_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See `VideoLlama3Model.get_video_features`."""
        return self.model.get_video_features(
            pixel_values_videos, video_grid_thw, video_merge_sizes, video_compression_mask, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        image_merge_sizes: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        video_merge_sizes: torch.Tensor | None = None,
        video_compression_mask: torch.Tensor | None = None,
        media_expand_size: int = 1,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> VideoLlama3CausalLMOutputWithPast:
        """Runs the model and its head; arguments not named here are those of `VideoLlama3Model.forward`.

        Args:
            input_ids: int64 (batch, sequence).
            attention_mask: int64 (batch, sequence).
            position_ids: int64 (batch, sequence).
            past_key_values: cache.
            inputs_embeds: (batch, sequence, width) instead of `input_ids`.
            labels: int64 (batch, sequence), aligned with `input_ids`, -100 where not supervised.
            use_cache: whether to return a cache; None: as the configuration says, but not where documents are packed,
                and not inside a compiled graph that was given positions, which cannot tell whether they restart.
            pixel_values: (patches of all images, 588).
            image_grid_thw: int64 (images, 3).
            image_merge_sizes: int64 (images,).
            pixel_values_videos: (patches of all videos, 588).
            video_grid_thw: int64 (videos, 3).
            video_merge_sizes: int64 (videos,).
            video_compression_mask: bool (visual tokens of all videos,).
            media_expand_size: rows per set of media, see `VideoLlama3Model.forward`.
            logits_to_keep: number of last positions whose logits are computed, or their indices; 0 = all.
            skip_logits: with labels, whether to return no logits; by default in training mode only.
            num_items_in_batch: divisor of the loss under gradient accumulation.
            kwargs: handed on.

        Raises:
            ValueError: as `VideoLlama3Model.forward` does; for `skip_logits` without labels.
        """
        if skip_logits and labels is None:
            raise ValueError("Expected labels with skip_logits=True, got none: there would be nothing to return.")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            image_merge_sizes=image_merge_sizes,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            video_merge_sizes=video_merge_sizes,
            video_compression_mask=video_compression_mask,
            media_expand_size=media_expand_size,
            # In generation, so many logits are asked for only to look at tokens that an assistant proposed.
            num_candidates=max(logits_to_keep - 1, 0) if isinstance(logits_to_keep, int) else 0,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = None
        if labels is not None:
            loss = supervised_loss(hidden, labels, self.lm_head, num_items_in_batch=num_items_in_batch)
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        return VideoLlama3CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Media go in with the prompt only; once the cache holds it, later steps need none.

        The arguments are transformers' own, which looks for some of these names in the signature.
        """
        # Chunked prefill of older transformers and assistants announce no first iteration: without this, the
        # media would be dropped and placeholders read as text. (A static cache has its length on the device: it is
        # not read at the steps of decoding.)
        is_step = next_sequence_length == 1 and input_ids.shape[1] > 1
        if (
            not (is_first_iteration or is_step)
            and past_key_values is not None
            and any(name in kwargs for name in MEDIA_INPUTS)
        ):
            is_first_iteration = bool(past_key_values.get_seq_length() == 0)
        if is_first_iteration and past_key_values is not None and inputs_embeds is None:
            kwargs |= self._media_to_read(input_ids, attention_mask, past_key_values, kwargs)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*MEDIA_INPUTS, "media_expand_size"):
                inputs.pop(name, None)
        return inputs

    def _media_to_read(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache, given: dict[str, Any]
    ) -> dict[str, Any]:
        """The media that an earlier call has not put into the cache."""
        num_cached = int(cache.get_seq_length())
        if num_cached == 0:
            return {}
        # The ids may be those of the new tokens alone; the mask is of all.
        left_out = 0 if attention_mask is None else attention_mask.shape[1] - input_ids.shape[1]
        return media_after_cache(
            {name: given.get(name) for name in MEDIA_INPUTS},
            input_ids[:: given.get("media_expand_size", 1)],
            num_cached=max(0, num_cached - left_out),
            token_ids={"image": self.config.image_token_id, "video": self.config.video_token_id},
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeats rows for beams and return sequences; media stay single and are encoded once."""
        media = {name: model_kwargs.pop(name) for name in MEDIA_INPUTS if name in model_kwargs}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if media and expand_size > 1:
            model_kwargs["media_expand_size"] = expand_size
        return input_ids, {**model_kwargs, **media}


__all__ = ["VideoLlama3ForCausalLM", "VideoLlama3Model"]
