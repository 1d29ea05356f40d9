"""The pages under docs/: every block runs, in order, on tiny checkpoints under the names that the pages use."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests.conftest import GOLDEN
from tests.media import write_clip
from tests.snippets import fenced_blocks, run_blocks
from videollama3.training.dataset_rows import missing_files, read_row

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("from_the_authors_code.md", "from_transformers.md")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of a reader: media, and checkpoints under their names on the Hub."""
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", 100, 25)
    Image.linear_gradient("L").resize((70, 98)).save(tmp_path / "picture.png")
    shutil.copytree(GOLDEN / "ckpt", tmp_path / "DAMO-NLP-SG" / "VideoLLaMA3-2B")
    return tmp_path


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


def write_parts(folder):
    """What `init` builds on: a SigLIP and a language model, as transformers saves them."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3, patch_size=14, image_size=56
    )
    SiglipVisionModel(vision).save_pretrained(folder / "google" / "siglip-so400m-patch14-384")
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "ckpt")
    text = Qwen2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=301,
        eos_token_id=300,
    )
    Qwen2ForCausalLM(text).save_pretrained(folder / "Qwen" / "Qwen2.5-1.5B-Instruct")
    tokenizer.save_pretrained(folder / "Qwen" / "Qwen2.5-1.5B-Instruct")


def test_from_the_authors_code(reader, capsys):
    write_parts(reader)
    blocks = fenced_blocks(page("from_the_authors_code.md"))
    outputs = run_blocks(blocks, capsys)
    assert [language for language, _ in blocks].count("diff") == 1
    for (language, code), output in zip(blocks, outputs, strict=True):
        assert output or language == "jsonl", code
    assert (reader / "sheet.png").is_file()
    assert (reader / "stage1" / "config.json").is_file()


def test_from_transformers(reader, capsys):
    blocks = fenced_blocks(page("from_transformers.md"))
    outputs = run_blocks(blocks, capsys)
    assert len(blocks) == 6
    # Measured 4.2e-6; a mask moved by one token is off by 3.
    assert float(outputs[3].rsplit(":", 1)[1]) < 1e-4
    for folder, model_type in (
        ("VideoLLaMA3-2B-native", "video_llama_3"),
        ("VideoLLaMA3-2B", "videollama3"),
        ("VideoLLaMA3-2B-official", "videollama3_qwen2"),
    ):
        assert json.loads((reader / folder / "config.json").read_text())["model_type"] == model_type


def test_the_rows_of_data_are_read(reader):
    ((_, rows),) = [block for block in fenced_blocks(page("from_the_authors_code.md")) if block[0] == "jsonl"]
    parsed = [read_row(json.loads(row), media_root=reader) for row in rows.splitlines()]
    assert len(parsed) == 4
    assert not any(missing_files(row) for row in parsed)


@pytest.mark.parametrize("name", PAGES)
def test_links_and_named_files_exist(name):
    text = page(name)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (DOCS / target).exists(), target
    for path in re.findall(r"`((?:tests|benchmarks|docs|src)/[\w./]*)`", text):
        assert (DOCS.parent / path).exists(), path
