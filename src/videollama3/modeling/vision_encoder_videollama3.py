"""The vision encoder: patches of any number of frames and images -> visual tokens.

Packed patches with their grids enter, one feature per visual token leaves (after the final layer norm and
the merge, before pruning and projection). Pixels are prepared by the processor; the projector and the
pruning mask are applied in `modeling_videollama3.py`.

Dimensions: T patches, C hidden width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .checkpoint_layouts import ENCODER_KEY_MAPPING
from .configuration_videollama3 import VideoLlama3VisionConfig
from .onednn_linear import OneDnnLinear, linear_then_gelu_tanh
from .packed_attention import attend_packed, eager_segment_attention
from .packed_segments import Grid, PackedSegments, chunk_grids, distinct_frames, pack_segments, read_grids
from .pretrained_videollama3 import VideoLlama3PreTrainedModel
from .sharded_modules import gathers_weights
from .torch_varlen import TORCH_VARLEN, check_varlen, computed_dtype, torch_varlen_attention, varlen_obstacle

# Without gradients the encoder takes whole segments in chunks whose activations stay below this, so that they
# do not grow with the number of frames.
MAX_ACTIVATION_BYTES_PER_CHUNK = 512 * 2**20


# On the CPU, rows of temporaries that fit its caches: measured, memory fresh from the system costs more than the
# arithmetic on it. The rotation's blocks are so small that torch runs each in one thread (its grain is 32768
# elements): thousands of short parallel sections stall on a machine that does other work. With more threads than
# these the whole in parallel is faster than blocks one after the other.
_ROTARY_ELEMENTS_PER_BLOCK = 32767
_MAX_THREADS_FOR_SERIAL_BLOCKS = 4
_MLP_ROWS_PER_BLOCK = 1024


def row_blocks(rows: torch.Tensor, rows_per_block: int, *, serial: bool = False) -> list[slice]:
    """Slices that cover the first dimension: blocks for inference on the CPU, else one of everything.

    Args:
        rows: (T, ...).
        rows_per_block: length of a block.
        serial: whether a block runs in one thread, so that blocks do not pay with many threads.
    """
    if rows.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [slice(None)]
    if serial and torch.get_num_threads() > _MAX_THREADS_FOR_SERIAL_BLOCKS:
        return [slice(None)]
    return [slice(start, start + rows_per_block) for start in range(0, rows.shape[0], rows_per_block)]


class DefaultAttention(str):
    """Name of an attention implementation that nobody asked for; equal to the plain name."""

    __slots__ = ()


class Attention(NamedTuple):
    """How one pass attends: chosen once, before the layers.

    Attributes:
        implementation: a name of transformers' attention interface, or "torch_varlen".
        function: the attention function of that name.
    """

    implementation: str
    function: Callable[..., Any]


def activation_bytes_per_patch(config: VideoLlama3VisionConfig, dtype: torch.dtype) -> int:
    """Bytes that one patch occupies inside a layer, at the highest point, without gradients.

    In the MLP these are the residual, its norm, and the wide layer before and after the activation; in
    attention the residual, its norm, query, key, value, the rotated query and key, and twice a row of float32 for
    temporaries of the rotation and of the kernel. Scores of `eager` attention have a bound of their own. (3 % more
    in bfloat16 on processors whose attention copies keys and values.)

    Args:
        config: of the encoder.
        dtype: of its weights.
    """
    size = dtype.itemsize
    mlp = size * (2 * config.hidden_size + 2 * config.intermediate_size)
    attention = size * 7 * config.hidden_size + 4 * 2 * config.hidden_size
    return max(mlp, attention)


def rotary_table(row_column: torch.Tensor, *, head_dim: int, rope_theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the 2D rotary embedding, in float32.

    The first half of the rotary pairs turns with the row, the second half with the column.

    Args:
        row_column: int64 (T, 2), position of each patch on its grid.
        head_dim: width of a head; a multiple of 4.
        rope_theta: base of the frequencies.

    Returns:
        Two float32 tensors (T, head_dim).
    """
    exponent = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=row_column.device) / (head_dim // 2)
    inverse_frequency = 1.0 / rope_theta**exponent
    angles = (row_column.to(torch.float32).unsqueeze(-1) * inverse_frequency).flatten(1).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rotary(states_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotates (T, H, D) by the table in float32 and returns the input's dtype."""
    half = states_THD.shape[-1] // 2
    # Both halves of the table are the same; products with it are float32.
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, :half]
    first, second = states_THD[..., :half], states_THD[..., half:]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat(turned, dim=-1).to(states_THD.dtype)
    result = torch.empty_like(states_THD)
    for rows in row_blocks(states_THD, max(1, _ROTARY_ELEMENTS_PER_BLOCK // (first.shape[1] * half)), serial=True):
        x, y, c, s = first[rows], second[rows], cos[rows], sin[rows]
        # Two kernels for each half: on a card what is read and written counts, 14 bytes an element instead of 30.
        torch.addcmul(x * c, y, s, value=-1, out=result[rows, :, :half])
        torch.addcmul(y * c, x, s, out=result[rows, :, half:])
    return result


def merge_blocks(hidden_TC: torch.Tensor, merge: int) -> torch.Tensor:
    """Reduces every merge x merge block of patches to one token, as bilinear downsampling by `merge` does.

    For an even size that is the mean of the block's four central patches (for 2, of all four), for an odd
    size its central patch; patches are in merge-block order, so a block is a run of merge**2 rows.

    Args:
        hidden_TC: (T, C).
        merge: side of a block.

    Returns:
        (T / merge**2, C).
    """
    if merge == 1:
        return hidden_TC
    blocks = hidden_TC.view(-1, merge, merge, hidden_TC.shape[-1])
    low, high = (merge - 1) // 2, merge // 2
    if low == high:
        return blocks[:, low, low]
    return blocks[:, low : high + 1, low : high + 1].mean(dim=(1, 2))


class PatchConvolution(nn.Conv2d):
    """A convolution whose stride is its kernel, over pictures that are cut into patches: one matrix product."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(T, channels * patch * patch) of any dtype -> (T, C) in the weight's dtype."""
        # Reshaped, not viewed: `channels_last` reorders the weight.
        weight = self.weight.reshape(self.out_channels, -1)
        return nn.functional.linear(patches.to(weight.dtype), weight, self.bias)


class VideoLlama3VisionEmbeddings(nn.Module):
    """Patches of 588 values -> hidden states: a 14 x 14 convolution of stride 14."""

    def __init__(self, config: VideoLlama3VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = PatchConvolution(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(T, channels * patch * patch), normalised floats or raw uint8 0..255 -> (T, C) in the weight's dtype."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = self._normalize(pixel_values)
        # Called, not read: weights that are offloaded arrive with the call.
        hidden: torch.Tensor = self.patch_embedding(pixel_values)
        return hidden

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        # Equal, for each of the 256 levels, to the processor's table.
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device)
            .repeat_interleave(self.config.patch_size**2)
            .unsqueeze(0)
            for values in (self.config.image_mean, self.config.image_std)
        )
        # Not by a number: CUDA would multiply by its reciprocal.
        highest = torch.full((), 255.0, device=pixels.device)
        return (pixels.to(torch.float32) / highest - mean) / std


class VideoLlama3VisionAttention(nn.Module):
    """Multi-head self-attention inside each segment, with 2D rotary positions."""

    def __init__(self, config: VideoLlama3VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.num_key_value_groups = 1
        # Three products: on the CPU one of three times the width is no faster (docs/memory.md); it has other names.
        self.q_proj = OneDnnLinear(config.hidden_size, config.hidden_size)
        self.k_proj = OneDnnLinear(config.hidden_size, config.hidden_size)
        self.v_proj = OneDnnLinear(config.hidden_size, config.hidden_size)
        self.out_proj = OneDnnLinear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_TC: torch.Tensor,
        segments: PackedSegments,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: Attention,
    ) -> torch.Tensor:
        """(T, C) -> (T, C); `rotary` are the two tables of `rotary_table`."""
        # -1 instead of the number of heads: under tensor parallelism a rank holds a part of them.
        query, key, value = (
            projection(hidden_TC).view(hidden_TC.shape[0], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend_packed(
            attention.function,
            self,
            apply_rotary(query, *rotary),
            apply_rotary(key, *rotary),
            value,
            segments=segments,
            implementation=attention.implementation,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return self.out_proj(attended.reshape(hidden_TC.shape[0], -1))


class VideoLlama3VisionMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: VideoLlama3VisionConfig) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.is_gelu_tanh = config.hidden_act == "gelu_pytorch_tanh"
        self.fc1 = OneDnnLinear(config.hidden_size, config.intermediate_size)
        self.fc2 = OneDnnLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        blocks = row_blocks(hidden_TC, _MLP_ROWS_PER_BLOCK)
        if len(blocks) == 1:
            return self._map(hidden_TC)
        result = torch.empty_like(hidden_TC)
        for rows in blocks:
            result[rows] = self._map(hidden_TC[rows])
        return result

    def _map(self, hidden_TC: torch.Tensor) -> torch.Tensor:
        activated = linear_then_gelu_tanh(self.fc1, hidden_TC) if self.is_gelu_tanh else None
        if activated is None:
            activated = self.activation_fn(self.fc1(hidden_TC))
        return self.fc2(activated)


class VideoLlama3VisionEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: VideoLlama3VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VideoLlama3VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VideoLlama3VisionMLP(config)

    def forward(
        self,
        hidden_TC: torch.Tensor,
        segments: PackedSegments,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: Attention,
    ) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        hidden_TC = hidden_TC + self.self_attn(self.layer_norm1(hidden_TC), segments, rotary, attention)
        return hidden_TC + self.mlp(self.layer_norm2(hidden_TC))


class VideoLlama3VisionEncoder(nn.Module):
    """The stack of encoder layers."""

    def __init__(self, config: VideoLlama3VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VideoLlama3VisionEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_TC: torch.Tensor,
        segments: PackedSegments,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attention: Attention,
    ) -> torch.Tensor:
        """(T, C) -> (T, C)."""
        for layer in self.layers:
            hidden_TC = layer(hidden_TC, segments, rotary, attention)
        return hidden_TC


class VideoLlama3VisionModel(VideoLlama3PreTrainedModel):
    """The encoder as a model of its own; it reads official (VL3-SigLIP-NaViT), native and our checkpoints."""

    config_class = VideoLlama3VisionConfig
    main_input_name = "pixel_values"
    _auto_class = "AutoModel"
    _auto_classes = {"AutoModel": "VideoLlama3VisionModel"}  # noqa: RUF012
    input_modalities = ("image",)
    # Also the encoder inside a whole model's checkpoint, whose other weights are then left aside.
    _official_key_mapping = ENCODER_KEY_MAPPING
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(model\.)?(language_model|layers|norm|embed_tokens|mm_projector|projector)\b",
        r"^lm_head\b",
    ]

    def __init__(self, config: VideoLlama3VisionConfig) -> None:
        super().__init__(config)
        self.embeddings = VideoLlama3VisionEmbeddings(config)
        self.encoder = VideoLlama3VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding: the module that is called, so that hooks on its output run."""
        return self.embeddings

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        grid_thw: torch.Tensor | None = None,
        merge_sizes: torch.Tensor | None = None,
        *,
        image_grid_thw: torch.Tensor | None = None,
        image_merge_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes images and videos of any sizes in one pass.

        Args:
            pixel_values: (T, channels * patch * patch), float (normalised) or uint8 (raw 0..255), patches of
                all items in order of appearance, each item in merge-block order.
            grid_thw: int64 (items, 3), frames, rows and columns of each item, in patches.
            merge_sizes: int64 (items,), side of the block of patches that becomes one token.
            image_grid_thw: `grid_thw` under the image processor's name, so that its output goes in as it is.
            image_merge_sizes: `merge_sizes` likewise.
            kwargs: `return_dict`, and `output_hidden_states`, with which nothing is left out and all is encoded at
                once; others are ignored, as transformers' models do.

        Returns:
            `last_hidden_state` (sum of frames * rows * columns / merge**2, C); with `output_hidden_states` also
            `hidden_states`, a tuple of what goes into the first layer and comes out of each, before the last norm and
            before blocks are merged: (T, C) each.

        Raises:
            TypeError: when the grids or the merge sizes are missing, or given under both names.
            ValueError: when `pixel_values` and the grids contradict each other; for `output_attentions`, which no
                kernel gives.
        """
        if kwargs.get("output_attentions"):
            raise ValueError(
                "Expected no output_attentions of the vision encoder, got it: its kernels keep no weights."
            )
        grids = read_grids(
            _exactly_one("grid_thw", grid_thw, image_grid_thw, kwargs),
            _exactly_one("merge_sizes", merge_sizes, image_merge_sizes, kwargs),
        )
        self._check_pixels(pixel_values, grids)
        if kwargs.get("output_hidden_states"):
            states: list[torch.Tensor] = []
            last = self._encode(pixel_values, grids, states=states)
            return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=tuple(states))
        if torch.is_grad_enabled() and self._learns(pixel_values):
            return BaseModelOutputWithPooling(last_hidden_state=self._encode(pixel_values, grids))
        with torch.no_grad():
            return BaseModelOutputWithPooling(last_hidden_state=self._encode_in_chunks(pixel_values, grids))

    def _learns(self, pixel_values: torch.Tensor) -> bool:
        """Whether a gradient goes into the encoder; a frozen one runs as in inference."""
        return pixel_values.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _encode_in_chunks(self, pixel_values: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """Repeated frames once, and no more segments at a time than the budget of bytes allows."""
        repeated = None
        if self.config.reuse_identical_frames:
            pixel_values, grids, repeated = distinct_frames(pixel_values, grids)
        chunks = [grids] if gathers_weights(self.encoder) else chunk_grids(grids, self._max_patches())
        sizes = [sum(grid.num_patches for grid in chunk) for chunk in chunks]
        parts = [self._encode(part, chunk) for part, chunk in zip(pixel_values.split(sizes), chunks, strict=True)]
        tokens = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tokens if repeated is None else tokens[repeated.to(tokens.device)]

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Transformers' check, which also lets "torch_varlen" pass where the package is not imported.

        Args:
            requested_attention: name of an implementation; None for the default, which stays marked as such.
            is_init_check: whether there are no weights yet.
        """
        if requested_attention == TORCH_VARLEN:
            return TORCH_VARLEN
        checked: str = super().get_correct_attn_implementation(requested_attention, is_init_check)
        return (
            DefaultAttention(checked) if requested_attention is None or _is_default(requested_attention) else checked
        )

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Chooses how segments attend; naming what is the default already makes it an explicit choice.

        What `config._attn_implementation` was before brings the default back. The arguments are transformers' own.
        """
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        if isinstance(attn_implementation, str) and attn_implementation == self.config._attn_implementation:
            self.config._attn_implementation_internal = (
                attn_implementation if _is_default(attn_implementation) else str(attn_implementation)
            )

    def _max_patches(self) -> int:
        dtype = self.embeddings.patch_embedding.weight.dtype
        return MAX_ACTIVATION_BYTES_PER_CHUNK // activation_bytes_per_patch(self.config, dtype)

    def _attention(self, hidden_TC: torch.Tensor) -> Attention:
        """What was asked for; where nothing was, torch's varlen kernel if it runs here."""
        implementation = self.config._attn_implementation
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        dropout = self.config.attention_dropout if self.training else 0.0
        dtype = computed_dtype(hidden_TC)
        if _is_default(implementation):
            runs = varlen_obstacle(hidden_TC.device, dtype, head_dim=head_dim, dropout=dropout) is None
            implementation = TORCH_VARLEN if runs else str(implementation)
        if implementation == TORCH_VARLEN:
            check_varlen(hidden_TC.device, dtype, head_dim=head_dim, dropout=dropout)
            return Attention(implementation, torch_varlen_attention)
        return Attention(
            implementation, ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_segment_attention)
        )

    def _encode(
        self, pixel_values: torch.Tensor, grids: list[Grid], *, states: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        segments = pack_segments(grids, pixel_values.device)
        rotary = rotary_table(
            segments.row_column,
            head_dim=self.config.hidden_size // self.config.num_attention_heads,
            rope_theta=self.config.rope_theta,
        )
        hidden = self.embeddings(pixel_values)
        if segments.gather is not None:
            hidden = hidden[segments.gather.to(hidden.device)]
        if states is None:
            hidden = self.encoder(hidden, segments, rotary, self._attention(hidden))
        else:
            attention = self._attention(hidden)
            states.append(segments.in_order(hidden))
            for layer in self.encoder.layers:
                hidden = layer(hidden, segments, rotary, attention)
                states.append(segments.in_order(hidden))
        hidden = segments.in_order(self.post_layernorm(hidden))
        parts = hidden.split([grid.num_patches for grid in grids])
        return torch.cat([merge_blocks(part, grid.merge) for part, grid in zip(parts, grids, strict=True)])

    def _check_pixels(self, pixel_values: torch.Tensor, grids: list[Grid]) -> None:
        num_patches = sum(grid.num_patches for grid in grids)
        width = self.config.num_channels * self.config.patch_size**2
        if tuple(pixel_values.shape) != (num_patches, width):
            raise ValueError(
                f"Expected pixel_values of shape ({num_patches}, {width}), as the grids of {len(grids)} item(s) "
                f"say, got {tuple(pixel_values.shape)}: pass the processor's tensors together, unchanged."
            )
        if not (pixel_values.is_floating_point() or pixel_values.dtype == torch.uint8):
            raise ValueError(f"Expected pixel_values as normalised floats or raw uint8, got {pixel_values.dtype}.")


def _is_default(implementation: str | None) -> bool:
    # By name: a local folder can load a class twice.
    return type(implementation).__name__ == DefaultAttention.__name__


def _exactly_one(
    name: str, given: torch.Tensor | None, from_processor: torch.Tensor | None, others: dict[str, Any]
) -> torch.Tensor:
    """The one tensor that was passed, under the model's name or under the image processor's."""
    if given is not None and from_processor is not None:
        raise TypeError(f"Expected one of {name} and image_{name}, got both.")
    tensor = from_processor if given is None else given
    if tensor is None:
        unknown = ", ".join(sorted(others)) or "nothing else"
        raise TypeError(
            f"Expected {name} (or image_{name}, as the image processor calls it) beside pixel_values, got {unknown}: "
            "pass the image processor's output as it is; what the authors' code calls grid_sizes is grid_thw here."
        )
    return tensor


__all__ = ["VideoLlama3VisionModel"]
