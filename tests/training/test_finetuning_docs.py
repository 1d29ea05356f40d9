"""docs/finetuning.md: its snippet runs as it is, and its list of keys is the recipe's."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from videollama3 import VideoLlama3Processor
from videollama3.training.recipe import recipe_from_dict
from videollama3.training.training_dataset import TrainingDataset

from .tiny_task import write_checkpoint, write_rows

DOCUMENT = Path(__file__).parents[2] / "docs" / "finetuning.md"


# Without a device, the default of TrainingArguments for pinned memory makes torch warn.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_snippet_trains(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    model_path = write_checkpoint(tmp_path / "start")
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {"model_path": model_path}
    exec(compile(snippet, "docs/finetuning.md", "exec"), names)
    assert len([line for line in snippet.splitlines() if line and "import" not in line]) <= 10
    start = names["VideoLlama3ForCausalLM"].from_pretrained(model_path, dtype="float32")
    moved = [not parameter.equal(start.get_parameter(name)) for name, parameter in names["model"].named_parameters()]
    assert any(moved)


def test_both_forms_of_a_row_say_the_same(tmp_path):
    (block,) = re.findall(r"```jsonl\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    write_rows(tmp_path)
    processor = VideoLlama3Processor.from_pretrained(write_checkpoint(tmp_path / "start"))
    rows = [json.loads(line) for line in block.splitlines()]
    authors, messages = TrainingDataset(rows, processor, media_root=tmp_path)
    assert authors["input_ids"].tolist() == messages["input_ids"].tolist()
    assert authors["labels"].tolist() == messages["labels"].tolist()


def test_every_key_is_listed():
    text = DOCUMENT.read_text(encoding="utf-8").split("## What every key means")[1]
    recipe = recipe_from_dict(
        {"model": {"path": "a"}, "data": {"train": "a"}, "rates": {"llm": 1}, "output": {"folder": "a"}, "adapter": {}}
    )
    keys = [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(recipe)
        for field in dataclasses.fields(getattr(recipe, section.name))
    ]
    assert re.findall(r"^\| `([a-z]+\.[a-z_]+)` \|", text, flags=re.MULTILINE) == keys
