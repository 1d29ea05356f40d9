"""A checkpoint to start training from: an image encoder and a language model of one's choice, a fresh projector.

Folders or Hub ids of the parts enter; a folder in this package's layout, with tokenizer and processor, and a report
leave. Reading the parts is left to `initial_parts.py`, training to `training/`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from ..modeling.configuration_videollama3 import VideoLlama3Config
from ..modeling.modeling_videollama3 import VideoLlama3ForCausalLM, VideoLlama3Projector
from ..processing.image_processing_videollama3 import VideoLlama3ImageProcessor
from ..processing.processing_videollama3 import VideoLlama3Processor
from ..processing.prompt_tokens import CHAT_TEMPLATE, IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ..processing.video_processing_videollama3 import VideoLlama3VideoProcessor
from .initial_parts import EncoderPart, LanguagePart, load_encoder, load_language_model
from .partial_folder import partial_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class InitialCheckpointReport:
    """What a new checkpoint is made of.

    Attributes:
        folder: where it stands.
        dtype: of every weight, as text ("bfloat16").
        encoder_source: folder or Hub id of the encoder.
        encoder_model_type: what that checkpoint says it is.
        encoder_dtype: of its weights as stored.
        encoder_unusual: fields in which it differs from the released encoder, as text.
        llm_source: folder or Hub id of the language model.
        llm_dtype: of its weights as stored.
        num_parameters: of "encoder", "projector" and "language model"; a tied head counts once.
        dropped: what was left behind of the encoder's checkpoint, as text.
        added_tokens: tokens that the tokenizer lacked, and their ids.
        num_rows_before: rows of the token embedding as stored.
        num_rows: rows of the token embedding now.
        tied: whether the head shares the embedding's weight.
        seed: of all fresh weights.
        added_stop_token: the token at which the generation configuration now stops too.
    """

    folder: str
    dtype: str
    encoder_source: str
    encoder_model_type: str
    encoder_dtype: str
    encoder_unusual: tuple[str, ...]
    llm_source: str
    llm_dtype: str
    num_parameters: Mapping[str, int]
    dropped: tuple[str, ...]
    added_tokens: Mapping[str, int]
    num_rows_before: int
    num_rows: int
    tied: bool
    seed: int
    added_stop_token: str | None

    def __str__(self) -> str:
        """The report as lines of text."""
        sizes = self.num_parameters
        lines = [
            f"encoder: {sizes['encoder']:,} parameters from {self.encoder_source} ({self.encoder_model_type})",
            *(f"  dropped: {group}" for group in self.dropped),
            *(f"  unlike the released one: {field}" for field in self.encoder_unusual),
            *self._cast(self.encoder_dtype),
            f"projector: {sizes['projector']:,} parameters, freshly initialised (seed {self.seed})",
            f"language model: {sizes['language model']:,} parameters from {self.llm_source}, "
            f"head {'tied to the embedding' if self.tied else 'of its own'}",
            *self._cast(self.llm_dtype),
            *self._token_lines(),
            f"wrote {self.folder}: {sum(sizes.values()):,} parameters in {self.dtype}",
        ]
        return "\n".join(lines)

    def _cast(self, stored: str) -> list[str]:
        return [] if stored == self.dtype else [f"  cast from {stored} to {self.dtype} (--dtype chooses)"]

    def _token_lines(self) -> list[str]:
        added = ", ".join(f"{token} = {token_id}" for token, token_id in self.added_tokens.items()) or "none"
        rows = f"embedding not resized: {self.num_rows} rows hold every token"
        if self.num_rows != self.num_rows_before:
            rows = f"embedding resized from {self.num_rows_before} to {self.num_rows} rows, the new ones fresh"
        lines = [f"tokenizer: added {added}", f"  {rows}"]
        if self.added_stop_token:
            lines.append(f"generation: stops at {self.added_stop_token} too, the end of an answer")
        return lines


def build_initial_checkpoint(
    vision: str | os.PathLike[str] | None,
    llm: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vision_from: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
) -> InitialCheckpointReport:
    """Joins an image encoder and a language model by a fresh projector and saves the model with its processor.

    Args:
        vision: folder or Hub id of a SigLIP, whose position embedding and pooling head are dropped, or of an encoder
            like VL3-SigLIP-NaViT in any layout; None with `vision_from`.
        llm: folder or Hub id of a Qwen2 or Qwen2.5 causal language model.
        out: the new folder; it is written beside and renamed when it is whole.
        vision_from: instead of `vision`, a whole VideoLLaMA3 of any layout; only its encoder is taken.
        dtype: of all weights; "auto" takes the language model's.
        seed: of the projector, and of the embedding's new rows where the tokenizer outgrows it.

    Returns:
        What was taken from where, dropped, added and freshly initialised.

    Raises:
        ValueError: unless exactly one of `vision` and `vision_from` is given, and for parts that do not fit.
        FileExistsError: when `out` exists and is not an empty folder.
    """
    if (vision is None) == (vision_from is None):
        raise ValueError(f"Expected exactly one of vision and vision_from, got {vision!r} and {vision_from!r}.")
    target = Path(out)
    _check_free(target)
    asked = _torch_dtype(dtype)
    if vision is not None:
        encoder = load_encoder(os.fspath(vision), whole_model=False)
    else:
        assert vision_from is not None
        encoder = load_encoder(os.fspath(vision_from), whole_model=True)
    language = load_language_model(os.fspath(llm), seed=seed)
    stored = encoder.model.dtype, language.model.dtype
    chosen = stored[1] if asked is None else asked
    model = _join(encoder, language, dtype=chosen, seed=seed)
    _save(model, _build_processor(encoder, language), target)
    return InitialCheckpointReport(
        folder=str(target),
        dtype=_name(chosen),
        encoder_source=encoder.source,
        encoder_model_type=encoder.model_type,
        encoder_dtype=_name(stored[0]),
        encoder_unusual=encoder.unusual,
        llm_source=language.source,
        llm_dtype=_name(stored[1]),
        num_parameters={
            "encoder": _count(model.model.vision_model),
            "projector": _count(model.model.projector),
            "language model": _count(language.model),
        },
        dropped=encoder.dropped,
        added_tokens=language.added_tokens,
        num_rows_before=language.num_rows_before,
        num_rows=model.config.text_config.vocab_size,
        tied=language.tied,
        seed=seed,
        added_stop_token=language.added_stop_token,
    )


def _join(encoder: EncoderPart, language: LanguagePart, *, dtype: torch.dtype, seed: int) -> VideoLlama3ForCausalLM:
    """The model made of the loaded modules themselves: no second copy of their weights is in memory."""
    vocabulary = language.tokenizer.get_vocab()
    config = VideoLlama3Config(
        text_config=_portable(language.model.config),
        vision_config=_portable(encoder.model.config),
        image_token_id=vocabulary[IMAGE_PLACEHOLDER],
        video_token_id=vocabulary[VIDEO_PLACEHOLDER],
        tie_word_embeddings=language.tied,
    )
    with torch.device("meta"):
        model = VideoLlama3ForCausalLM(config)
    model.model.vision_model = encoder.model.to(dtype)
    model.model.language_model = language.model.model.to(dtype)
    model.lm_head = language.model.lm_head.to(dtype)
    model.model.projector = _fresh_projector(model, config, seed=seed).to(dtype)
    model.generation_config = language.model.generation_config
    unfilled = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unfilled:
        raise ValueError(f"Expected every weight to come from a part or to be fresh, got none for {unfilled}.")
    return model


def _portable(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields without the folder they were read from, and without the code and version that go with it."""
    own = ("_name_or_path", "architectures", "auto_map", "transformers_version")
    return {name: value for name, value in config.to_dict().items() if name not in own}


def _fresh_projector(model: VideoLlama3ForCausalLM, config: VideoLlama3Config, *, seed: int) -> VideoLlama3Projector:
    """A projector as a new `VideoLlama3ForCausalLM` has it; drawn in float32, so that it is the same in any dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = VideoLlama3Projector(config)
        for module in projector.modules():
            model._init_weights(module)
    return projector


def _build_processor(encoder: EncoderPart, language: LanguagePart) -> VideoLlama3Processor:
    """The released models' settings, for the encoder's patches and colours."""
    config = encoder.model.config
    own = {"patch_size": config.patch_size, "image_mean": config.image_mean, "image_std": config.image_std}
    language.tokenizer.chat_template = CHAT_TEMPLATE
    return VideoLlama3Processor(VideoLlama3ImageProcessor(**own), language.tokenizer, VideoLlama3VideoProcessor(**own))


def _check_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"Expected a new or empty folder for the checkpoint, got {str(target)!r}, which is not.")


def _save(model: VideoLlama3ForCausalLM, processor: VideoLlama3Processor, target: Path) -> None:
    """Writes beside and renames: an interrupted run leaves nothing that looks whole."""
    with partial_folder(str(target), say=logger.warning) as beside:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)


def _torch_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """The dtype of that name; None for "auto"."""
    dtypes = {_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    key = name if isinstance(name, str) else _name(name)
    if key not in ("auto", *dtypes):
        raise ValueError(f"Expected dtype 'auto', 'float32', 'bfloat16' or 'float16', got {name!r}.")
    return dtypes.get(key)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
