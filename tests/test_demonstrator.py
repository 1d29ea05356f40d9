"""The checkpoint inside the package: it loads by every way, is small, and answers as its card says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from demonstrator.card import render_card
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import videollama3
from videollama3.demonstrator import NOTICE

FOLDER = videollama3.demonstrator_path()
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 230),
    "yellow": (230, 210, 50),
    "purple": (150, 50, 200),
    "white": (240, 240, 240),
}


@pytest.fixture(scope="module")
def demonstrator():
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


def _draw(draw, kind, x, y, half, fill):
    box = (x - half, y - half, x + half, y + half)
    if kind == "circle":
        draw.ellipse(box, fill=fill)
    elif kind == "square":
        draw.rectangle(box, fill=fill)
    elif kind == "triangle":
        draw.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=fill)
    else:
        third = half / 3
        draw.rectangle((x - third, y - half, x + third, y + half), fill=fill)
        draw.rectangle((x - half, y - third, x + half, y + third), fill=fill)


def _clip(path, kind, color, motion, *, size=(160, 120), seconds=4, rate=12):
    """A clip drawn without the generator that the checkpoint was trained on."""
    width, height = size
    half = min(size) * 0.22
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(seconds * rate):
            share = i / (seconds * rate - 1)
            dx, dy = motion
            x = width / 2 + dx * (share - 0.5) * (width - 2.5 * half)
            y = height / 2 + dy * (share - 0.5) * (height - 2.5 * half)
            image = Image.new("RGB", size, (20, 22, 28))
            _draw(ImageDraw.Draw(image), kind, x, y, half, COLORS[color])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def _answers(demonstrator, path, questions):
    model, processor = demonstrator
    inputs = processor(
        conversation=[
            [{"role": "user", "content": [{"type": "video", "path": path}, {"type": "text", "text": question}]}]
            for question in questions
        ],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_is_small_and_carries_no_code():
    files = list(FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < 16 * 2**20
    assert not [path.name for path in files if path.suffix == ".py"]
    assert (FOLDER / "README.md").is_file()


@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.parametrize("path", [FOLDER, str(FOLDER)])
def test_every_auto_class_loads_it(path, trust_remote_code):
    options = {} if trust_remote_code is None else {"trust_remote_code": True}
    assert type(AutoConfig.from_pretrained(path, **options)) is videollama3.VideoLlama3Config
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    assert type(model) is videollama3.VideoLlama3ForCausalLM
    assert 3e6 <= model.num_parameters() <= 8e6
    assert f"{model.num_parameters() / 1e6:.1f} million parameters" in NOTICE
    processor = AutoProcessor.from_pretrained(path, **options)
    assert type(processor) is videollama3.VideoLlama3Processor
    assert processor.video_processor.fps == 1


@pytest.mark.parametrize(
    ("kind", "color", "motion"),
    [
        ("circle", "red", (1, 0)),
        ("square", "blue", (-1, 0)),
        ("triangle", "yellow", (0, 1)),
        ("cross", "green", (0, -1)),
        ("square", "white", (0, 0)),
        ("circle", "purple", (0, 0)),
    ],
)
def test_it_knows_colour_shape_number_and_direction(demonstrator, tmp_path, kind, color, motion):
    path = _clip(tmp_path / "clip.mp4", kind, color, motion)
    said = _answers(
        demonstrator,
        path,
        [
            "What color is the shape?",
            "What shape is it?",
            "How many shapes are there?",
            "Which way does the shape move?",
        ],
    )
    way = {(1, 0): "right", (-1, 0): "left", (0, 1): "down", (0, -1): "up", (0, 0): "not move"}[motion]
    for text, expected in zip(said, (color, kind, "one", way), strict=True):
        assert expected in text.lower(), said


def test_the_card_says_what_the_report_says():
    """What the shipped checkpoint reached, measured by demonstrator/evaluate.py."""
    reports = Path(__file__).parents[1] / "demonstrator"
    report, watching = (json.loads((reports / name).read_text()) for name in ("report.json", "watching.json"))
    assert (FOLDER / "README.md").read_text() == render_card(report, watching)
    for kind, least in (("color", 97), ("shape", 95), ("direction", 95), ("count", 90)):
        assert report["accuracy"][f"one/{kind}"]["percent"] >= least
    for scenes in ("video", "several", "events"):
        assert report["accuracy"][f"{scenes}/count"]["percent"] >= 90
    assert report["pruned_percent"] > 0


def test_the_command_answers_without_a_model(tmp_path):
    path = _clip(tmp_path / "clip.mp4", "circle", "red", (1, 0))
    result = subprocess.run(
        [sys.executable, "-m", "videollama3", "ask", path, "What color is the shape?"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        stdin=subprocess.DEVNULL,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "red" in result.stdout
    assert "the demonstrator answers" in result.stderr
