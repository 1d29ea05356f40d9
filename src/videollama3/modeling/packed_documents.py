"""Which rows hold several documents, and what keeps these apart on each attention implementation.

Positions, a mask and what a forward pass was given enter; the mask and arguments for the language model leave, with
which no document sees another. Attention itself is left to `document_attention.py` and to kernels.

A document begins where positions restart, that is where one is not larger than the one before; positions may leave
some out. transformers' own mask begins one there too, and follows positions only where there is neither a mask nor a
cache, hence what is done here:

    sdpa                          one document after the other (`Documents`)
    flash_attention_2, varlen     bounds, read once for all layers
    eager, flex_attention         transformers' own mask, where no position is left out; else a mask of all pairs
    inside a compiled graph       a mask of all pairs, since nobody can look
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .document_attention import Documents, attends_by_document
from .torch_varlen import TORCH_VARLEN, computed_dtype, varlen_obstacle

# In place of what positions say at padding: followed by no document's first position, and larger than none.
_POSITION_OF_PADDING = -5


def keep_documents_apart(
    language_model: Any,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: Any,
    past_key_values: Any,
    use_cache: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Any, torch.Tensor | None, bool | None, dict[str, Any]]:
    """Mask, positions, `use_cache` and further arguments with which documents are kept apart.

    Rows of several documents, and those that come with bounds for a kernel, make no cache unless one is asked for.

    Args:
        language_model: a `Qwen2Model` that `attend_by_document` was called on.
        inputs_embeds: (batch, sequence, width).
        position_ids: int64 (batch or 1, sequence), or None.
        attention_mask: (batch, sequence), 0 at padding; None, or anything else that transformers takes.
        past_key_values: cache, or None.
        use_cache: as the caller asks.
        kwargs: of the language model.

    Raises:
        ValueError: when a cache of several documents is asked for, when a kernel that takes one row gets several, or
            when there is padding between documents.
    """
    config = language_model.config
    has_bounds = kwargs.get("cu_seq_lens_q") is not None
    if torch.compiler.is_compiling():
        if past_key_values is not None or position_ids is None:
            return attention_mask, position_ids, use_cache, kwargs
        if "flash" in config._attn_implementation and not has_bounds:
            # Outside of the graph, where positions can be looked at; with fullgraph=True this is an error.
            outside = torch.compiler.disable(keep_documents_apart)
            kept: tuple[Any, torch.Tensor | None, bool | None, dict[str, Any]] = outside(
                language_model, inputs_embeds, position_ids, attention_mask, past_key_values, use_cache, kwargs
            )
            return kept
        mask = _mask_in_graph(config, inputs_embeds, position_ids, attention_mask, has_bounds=has_bounds)
        return mask, position_ids, bool(use_cache), kwargs
    num_rows = inputs_embeds.shape[0]
    if has_bounds and num_rows == 1 and not use_cache and past_key_values is None and _goes_by_bounds(config):
        # Nobody waits for the device to say what the bounds say; the kernel reads no mask.
        return dict.fromkeys(config.layer_types), position_ids, False, kwargs
    restart, jump = look_at_positions(position_ids, attention_mask)
    if restart:
        assert position_ids is not None
        if use_cache or past_key_values is not None:
            raise ValueError(
                "Expected no cache (use_cache=False) for rows whose position_ids restart, got one: a cache of "
                "several documents cannot be continued (generate answers one document at a time)."
            )
        mask, kwargs = _documents(language_model, inputs_embeds, position_ids, attention_mask, kwargs, jump=jump)
        if mask is None and attention_mask is not None:
            # It goes by positions alone then, by how they go on.
            is_token = attention_mask.to(position_ids.device, torch.bool)
            position_ids = torch.where(is_token, position_ids, _POSITION_OF_PADDING)
        return mask, position_ids, False, kwargs
    if jump and attention_mask is None and past_key_values is None:
        # Without a mask transformers would begin a document where positions leave some out.
        attention_mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
    return attention_mask, position_ids, use_cache, kwargs


def _documents(
    language_model: Any,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    *,
    jump: bool,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What keeps documents apart, by kind of layer, and all arguments; None where transformers' mask does."""
    config, num_rows = language_model.config, inputs_embeds.shape[0]
    implementation = config._attn_implementation
    has_bounds = kwargs.get("cu_seq_lens_q") is not None
    if num_rows != 1 and ("flash" in implementation or (implementation == TORCH_VARLEN and has_bounds)):
        raise ValueError(
            f"Expected one row of documents for {implementation}, got {num_rows} rows: pack them into one, or choose "
            '"sdpa".'
        )
    if not has_bounds and num_rows == 1 and _takes_bounds(language_model, inputs_embeds):
        documents = read_documents(position_ids, attention_mask, num_rows)
        kwargs, has_bounds = {**kwargs, **documents.bounds(inputs_embeds.device)}, True
    if has_bounds and _goes_by_bounds(config):
        # The kernel reads no mask.
        return dict.fromkeys(config.layer_types), kwargs
    if attention_mask is not None and has_holes(attention_mask):
        raise ValueError(
            "Expected padding only before and after the documents of a row, got some between tokens: drop it, "
            "positions that restart keep documents apart."
        )
    if attends_by_document(language_model, device=inputs_embeds.device, **kwargs):
        return {"full_attention": read_documents(position_ids, attention_mask, num_rows)}, kwargs
    if not jump:
        return None, kwargs
    dtype = computed_dtype(inputs_embeds)
    return masks_of_documents(position_ids, attention_mask, config=config, dtype=dtype, num_rows=num_rows), kwargs


def _goes_by_bounds(config: Any) -> bool:
    """Whether the kernel knows documents by where they begin and end."""
    return "flash" in config._attn_implementation or config._attn_implementation == TORCH_VARLEN


def _takes_bounds(language_model: Any, inputs_embeds: torch.Tensor) -> bool:
    """Whether a kernel that goes by bounds takes the layers as they are here."""
    config = language_model.config
    if config._attn_implementation != TORCH_VARLEN:
        return "flash" in config._attn_implementation
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropout = config.attention_dropout if language_model.training else 0.0
    dtype = computed_dtype(inputs_embeds)
    obstacle = varlen_obstacle(inputs_embeds.device, dtype, head_dim=head_dim, dropout=dropout)
    return obstacle is None and set(config.layer_types) == {"full_attention"}


def _mask_in_graph(
    config: Any, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, attention_mask: Any, *, has_bounds: bool
) -> Any:
    """Masks that follow restarting positions, which transformers' need not; those of all pairs stay as they are."""
    if has_bounds and _goes_by_bounds(config):
        return dict.fromkeys(config.layer_types)
    is_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    if position_ids.ndim != 2 or not (attention_mask is None or is_padding):
        return attention_mask
    if is_padding and attention_mask.shape[-1] != position_ids.shape[-1]:
        return attention_mask
    num_rows, dtype = inputs_embeds.shape[0], inputs_embeds.dtype
    return masks_of_documents(position_ids, attention_mask, config=config, dtype=dtype, num_rows=num_rows)


def look_at_positions(position_ids: torch.Tensor | None, attention_mask: Any) -> tuple[bool, bool]:
    """Whether positions restart among the tokens of a row, that is begin a document, and whether they leave some out.

    Two documents and padding on the right, whose positions say nothing:

        position_ids    0 1 2 0 1 2 3 0 0
        attention_mask  1 1 1 1 1 1 1 0 0

    Args:
        position_ids: int64 (batch or 1, sequence).
        attention_mask: (batch, sequence), 0 at padding; with a cache its last columns are those of the positions.
    """
    if position_ids is None or position_ids.ndim != 2:
        return False, False
    steps = position_ids.diff(dim=-1)
    found = torch.stack([steps <= 0, steps > 1])
    if attention_mask is not None:
        length = position_ids.shape[-1]
        # With a static cache `generate` hands over a dict of masks of all pairs.
        is_padding = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if not is_padding or attention_mask.shape[1] < length:
            return False, False
        is_token = attention_mask[:, -length:].to(device=steps.device, dtype=torch.bool)
        found = found & is_token[:, 1:] & is_token[:, :-1]
    restart, jump = found.flatten(1).any(dim=1).tolist()
    return restart, jump


def has_holes(attention_mask: torch.Tensor) -> bool:
    """Whether a row of a mask (batch, sequence) has padding between its tokens."""
    is_token = attention_mask.to(torch.bool)
    begins = is_token[:, 1:] & ~is_token[:, :-1]
    return bool((begins.sum(dim=1) + is_token[:, 0] > 1).any())


def read_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_rows: int) -> Documents:
    """Where documents begin: wherever a position is not larger than the one before.

    Two documents and padding on the right, which counts as one more, since nobody looks there:

        position_ids    0 1 2 0 1 2 3 0 0
        attention_mask  1 1 1 1 1 1 1 0 0      lengths 3, 4, 2

    Args:
        position_ids: int64 (num_rows or 1, L).
        attention_mask: (num_rows, L), 0 at padding; None without padding.
        num_rows: rows of the batch.

    Returns:
        The lengths, on the host: the only place where it waits for the device.
    """
    begins = _begins(position_ids, attention_mask).expand(num_rows, -1).flatten()
    first = begins.nonzero().flatten()
    return Documents(tuple(first.diff(append=first.new_tensor([begins.numel()])).tolist()))


def _begins(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Whether a document, or padding, begins at a token: bool (rows, L)."""
    # The first of a row follows nothing.
    begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1]) <= 0
    if attention_mask is None:
        return begins
    is_token = attention_mask.to(device=begins.device, dtype=torch.bool)
    before, after = is_token[:, :-1], is_token[:, 1:]
    # Padding on the left ends where the tokens begin, whatever its positions are.
    inner = (begins[:, 1:] & (before | after)) | (before != after)
    return torch.cat([begins[:, :1].expand(len(is_token), -1), inner], dim=1)


def masks_of_documents(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, *, config: Any, dtype: torch.dtype, num_rows: int
) -> dict[str, torch.Tensor]:
    """Masks of all pairs that keep documents apart, where transformers' own would not; these begin as above.

    Args:
        position_ids: int64 (B or 1, L).
        attention_mask: (B, L), 0 at padding; None without padding.
        config: of the language model, whose kinds of layers each get one.
        dtype: of the result.
        num_rows: B.

    Returns:
        By kind of layer (B, 1, L, L), 0 where a token (row) sees another (column), else the lowest number of `dtype`.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(position_ids)
    is_token = attention_mask.to(device=position_ids.device, dtype=torch.bool)
    restarts = (position_ids.diff(dim=-1) <= 0) & is_token[:, 1:] & is_token[:, :-1]
    document = nn.functional.pad(restarts.cumsum(dim=-1), (1, 0))
    order = torch.arange(document.shape[-1], device=document.device)
    sees = (document[:, :, None] == document[:, None, :]) & (order[:, None] > order[None, :]) & is_token[:, None, :]
    # Itself too, so that padding sees something.
    sees = (sees | (order[:, None] == order[None, :])).expand(num_rows, -1, -1)
    near = order[:, None] - order[None, :] < (getattr(config, "sliding_window", None) or len(order))
    kinds = {kind: sees & near if kind == "sliding_attention" else sees for kind in set(config.layer_types)}
    lowest = torch.finfo(dtype).min
    return {
        kind: torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, lowest).unsqueeze(1)
        for kind, seen in kinds.items()
    }
