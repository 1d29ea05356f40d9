"""Tiny configurations and hand-built media for the model's tests; sizes differ on every axis."""

import itertools

import torch

from videollama3 import VideoLlama3Config, VideoLlama3VisionConfig

# Placeholders of the golden checkpoint's tokenizer.
IMAGE = 308
VIDEO = 309
PATCH_WIDTH = 3 * 14 * 14


def tiny_vision_config(**changes):
    fields = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    return VideoLlama3VisionConfig(**{**fields, **changes})


def tiny_config(**changes):
    text = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "bos_token_id": 301,
        "eos_token_id": 300,
    }
    fields = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    return VideoLlama3Config(text_config=text, vision_config=tiny_vision_config().to_dict(), **{**fields, **changes})


def media(grids, merges, seed=0):
    """Random patches: float32 (patches, 588), int64 (items, 3), int64 (items,)."""
    grid_thw, merge_sizes = torch.tensor(grids), torch.tensor(merges)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(int(grid_thw.prod(dim=1).sum()), PATCH_WIDTH, generator=generator) * 2 - 1
    return pixels, grid_thw, merge_sizes


def images(grids, merges, seed=0):
    """The same under the model's argument names."""
    names = ("pixel_values", "image_grid_thw", "image_merge_sizes")
    return dict(zip(names, media(grids, merges, seed), strict=True))


def videos(grids, merges, *, keep=None, seed=1):
    """Likewise; `keep` is the share of kept tokens, None for no mask."""
    pixels, grid_thw, merge_sizes = media(grids, merges, seed)
    inputs = {"pixel_values_videos": pixels, "video_grid_thw": grid_thw, "video_merge_sizes": merge_sizes}
    if keep is not None:
        total = int((grid_thw.prod(dim=1) // merge_sizes**2).sum())
        generator = torch.Generator().manual_seed(seed + 100)
        inputs["video_compression_mask"] = torch.rand(total, generator=generator) < keep
    return inputs


def text(length, seed=2):
    """int64 (length,), ids that are no placeholder and no end."""
    return torch.randint(0, 290, (length,), generator=torch.Generator().manual_seed(seed))


def prompt(*parts):
    """int64 (1, sequence) and its attention mask, from ids and (token id, count) pairs."""
    pieces = [torch.full((part[1],), part[0]) if isinstance(part, tuple) else part for part in parts]
    ids = torch.cat(pieces).unsqueeze(0)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_and_video_request():
    """One row: an image of 12 tokens, text, a pruned video of 2 frames and a second one, text."""
    video = videos([[2, 4, 6], [3, 2, 4]], [2, 2], keep=0.6)
    kept = int(video["video_compression_mask"].sum())
    row = prompt(text(5), (IMAGE, 12), text(3, 3), (VIDEO, kept), text(6, 4))
    return {**row, **images([[1, 3, 4]], [1]), **video}


def batch(requests, *, padding_side, pad_id=301):
    """Rows of single requests as one batch; media one after the other, in order of rows."""
    length = max(request["input_ids"].shape[1] for request in requests)
    joined = {}
    for name, fill in (("input_ids", pad_id), ("attention_mask", 0)):
        rows = []
        for request in requests:
            space = request[name].new_full((1, length - request[name].shape[1]), fill)
            pair = (space, request[name]) if padding_side == "left" else (request[name], space)
            rows.append(torch.cat(pair, dim=1))
        joined[name] = torch.cat(rows)
    for name in sorted({name for request in requests for name in request} - set(joined)):
        joined[name] = torch.cat([request[name] for request in requests if name in request])
    return joined


def packed_with_bounds(model, documents):
    """Logits of documents (1, tokens) in one row, with what kernels of packed sequences go by; one per document."""
    lengths = [document.shape[1] for document in documents]
    device = documents[0].device
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    logits = model(
        input_ids=torch.cat(documents, dim=1),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(device),
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
    ).logits
    return logits.split(lengths, dim=1)
