"""A tiny checkpoint, media and conversations that both transformers and vLLM answer."""

import base64
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.media import numbered_picture, write_clip
from videollama3.random_checkpoint import build_random

MAX_NEW_TOKENS = 12

# name: what the user's turn holds, in order; a string is text, a file's stem is that file.
CASES = {
    "text": ["Say something about nothing."],
    "one image": ["image:small", "What is this?"],
    "two images": ["image:small", "Compare with ", "image:wide", "these two."],
    "transparent image": ["image:alpha", "And this?"],
    "one video": ["video:moving", "What happens?"],
    "another video": ["video:other", "What happens?"],
    "two videos": ["video:moving", "then ", "video:slides", "Differences?"],
    "pruned little": ["video:half", "What moves?"],
    "pruned to almost nothing": ["video:still", "Does anything happen?"],
    "mixed": ["image:wide", "and ", "video:slides", "and ", "image:small", "and", "video:still", "in order?"],
    "over the budget together": ["image:large", "image:large", "video:moving", "Sizes?"],
}

# name: a case, and options of the processor that go with the request.
EXTRA = {
    "fps 2": ("one video", {"fps": 2}),
    "at most 2 frames": ("one video", {"max_frames": 2}),
    "a small budget": ("mixed", {"max_visual_tokens": 100}),
    # Two clips of one length, unpruned: prompts of equal ids, which only the media tell apart.
    "unpruned": ("one video", {"use_token_compression": False}),
    "unpruned, another clip": ("another video", {"use_token_compression": False}),
    "system prompt": ("one image", {"add_system_prompt": True}),
}


def write_checkpoint(folder):
    """Weights large enough that the answer hangs on every input."""
    model, processor = build_random(seed=3, hidden_size=128, num_hidden_layers=2, max_tokens=512)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "language_model" in name else 5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_media(folder):
    """Pictures and clips of the cases; returns name -> path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    sizes = {"small": (75, 64), "wide": (60, 182), "large": (330, 420)}
    paths = {}
    for name, size in sizes.items():
        paths[name] = folder / f"{name}.png"
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(paths[name])
    paths["alpha"] = folder / "alpha.png"
    Image.fromarray(generator.integers(0, 255, (70, 84, 4), dtype=np.uint8), "RGBA").save(paths["alpha"])
    still = numbered_picture(5)
    half = [numbered_picture(i) for i in range(75)]
    for i, picture in enumerate(half):
        picture[:, :104] = numbered_picture(i // 30)[:, :104]
    clips = {
        "other": [numbered_picture(37 + i * 5) for i in range(100)],
        "moving": [numbered_picture(i) for i in range(100)],
        "slides": [numbered_picture(i // 50) for i in range(150)],
        "half": half,
        "still": [still] * 150,
    }
    for name, pictures in clips.items():
        paths[name] = folder / f"{name}.mp4"
        write_clip(paths[name], len(pictures), pictures=pictures, options={"crf": "0"}, pix_fmt="yuv444p")
    return paths


def _parts(case, render):
    return [
        render(*part.split(":", 1)) if part.startswith(("image:", "video:")) else text(part) for part in CASES[case]
    ]


def text(content):
    return {"type": "text", "text": content}


def for_transformers(case, paths):
    """The conversation with paths."""
    content = _parts(case, lambda kind, name: {"type": kind, "path": str(paths[name])})
    return [{"role": "user", "content": content}]


def for_vllm(case, paths, url=None):
    """The conversation in OpenAI's form; `url` makes one of a path, data URLs by default."""
    url = url or data_url

    def render(kind, name):
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url(paths[name])}}

    return [{"role": "user", "content": _parts(case, render)}]


def data_url(path):
    kind = "video/mp4" if str(path).endswith(".mp4") else "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
