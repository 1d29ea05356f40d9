"""Model cards: valid, complete, true to their facts, and every snippet runs."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub import parse_eval_result_entries as parse_entries
from PIL import Image

from tests.conftest import GOLDEN
from tests.media import write_clip
from tests.modeling.tiny import tiny_config, tiny_vision_config
from tests.snippets import fenced_blocks, run_blocks
from videollama3 import VideoLlama3ForCausalLM, VideoLlama3ImageProcessor, VideoLlama3VisionModel
from videollama3.cli import main
from videollama3.conversion.model_card import FACTS, KINDS, RELEASES, is_hub_id, release_sizes, render_card
from videollama3.conversion.model_card_folder import is_own_card, kind_of, signed, write_card
from videollama3.conversion.model_card_memory import ModelSizes, budget_rows, gigabytes, sizes_of
from videollama3.conversion.model_card_training import TrainingFacts, read_training
from videollama3.random_checkpoint import build_random

ROOT = Path(__file__).parent.parent.parent
RECORD = {
    "base_model": "DAMO-NLP-SG/VideoLLaMA3-2B",
    "recipe": {"learning_rate": 1e-5, "frozen": ["encoder"], "note": "a | b"},
    "data": ["someone/clips", "/home/somebody/private/rows.jsonl", "/home/somebody/more.jsonl"],
    "num_train_samples": 1234,
    "num_skipped_samples": 3,
    "final_train_loss": 0.75,
    "eval": {
        "loss": 0.8,
        "exact match": {"value": 61.5, "metric": "accuracy", "dataset_id": "someone/bench", "task_id": "open"},
    },
    "versions": {"torch": "2.13.0"},
}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path.parent


def release_config(size, model_type="videollama3"):
    sizes = FACTS["architectures"][size]
    vision = {
        "hidden_size": sizes["vision_hidden"],
        "intermediate_size": sizes["vision_intermediate"],
        "num_hidden_layers": sizes["vision_layers"],
    }
    text = {
        "hidden_size": sizes["text_hidden"],
        "intermediate_size": sizes["text_intermediate"],
        "num_hidden_layers": sizes["text_layers"],
        "num_attention_heads": sizes["text_heads"],
        "num_key_value_heads": sizes["text_kv_heads"],
        "vocab_size": sizes["vocabulary"],
    }
    if model_type == "videollama3_qwen2":
        return {"model_type": model_type, **text, "vision_encoder_config": vision}
    return {"model_type": model_type, "text_config": text, "vision_config": vision}


@pytest.fixture
def own_checkpoint(tmp_path):
    """A tiny checkpoint of our layout, named as its release."""
    model, processor = build_random()
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def media_folder(tmp_path, monkeypatch):
    """The current folder, with the media that the snippets name."""
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.mp4", 75, 25)
    Image.linear_gradient("L").resize((70, 98)).save(tmp_path / "picture.png")
    return tmp_path


# What stands in the cards


@pytest.mark.parametrize("kind", RELEASES)
def test_the_rendered_cards_are_up_to_date(kind):
    path = ROOT / "model_cards" / f"{FACTS['kinds'][kind]['name']}.md"
    assert path.read_text(encoding="utf-8") == render_card(kind), (
        f"render {path} again: model_cards/README.md says how"
    )


def test_no_card_is_left_over():
    names = {f"{release['name']}.md" for release in FACTS["kinds"].values()} | {"README.md"}
    assert {path.name for path in (ROOT / "model_cards").iterdir()} == names


def test_the_snippet_that_renders_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_cards").mkdir()
    run_blocks(fenced_blocks((ROOT / "model_cards" / "README.md").read_text(encoding="utf-8")), capsys)
    assert len(list((tmp_path / "model_cards").iterdir())) == len(RELEASES)
    for path in (tmp_path / "model_cards").iterdir():
        assert path.read_bytes() == (ROOT / "model_cards" / path.name).read_bytes()


@pytest.mark.parametrize("kind", RELEASES)
def test_metadata_is_what_the_hub_reads(kind):
    # The loader rebuilds the EvalResults and raises for a model-index that is not one.
    card = ModelCard(render_card(kind), ignore_metadata_errors=False)
    release = FACTS["kinds"][kind]
    tags = {"video": "video-text-to-text", "image": "image-text-to-text", "encoder": "image-feature-extraction"}
    assert card.data.pipeline_tag == tags[release["modality"]]
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == f"DAMO-NLP-SG/{release['name']}"
    assert "videollama3" in card.data.tags
    assert all(isinstance(result, EvalResult) for result in card.data.eval_results or ())
    # Nothing is lost or reworded on the way through the library.
    assert yaml.safe_load(card.data.to_yaml()) == yaml.safe_load(render_card(kind).split("---\n")[1])


# From the paper's version 4, typed a second time.
SCORES = {
    "2B": [59.6, 63.4, 39.9, 65.5, 58.5, 68.0, 58.2, 65.4, 57.1, 41.6, 63.4, 81.1, 55.5],
    "7B": [66.2, 70.3, 44.1, 69.7, 63.3, 72.8, 61.3, 73.0, 59.8, 45.3, 68.1, 84.5, 60.7],
    "2B-Image": [79.8, 91.9, 69.4, 779, 59.2, 15.5, 28.6, 45.3, 44.2, 67.3, 78.2, 62.7, 1901],
    "7B-Image": [86.3, 94.9, 78.9, 828, 67.1, 26.2, 33.6, 48.8, 56.7, 72.7, 84.7, 64.9, 2102],
}


@pytest.mark.parametrize("kind", SCORES)
def test_published_scores(kind):
    card = ModelCard(render_card(kind))
    assert [result.metric_value for result in card.data.eval_results] == SCORES[kind]
    assert {result.source_url for result in card.data.eval_results} == {"https://arxiv.org/abs/2501.13106v4"}
    for value in SCORES[kind]:
        assert f"| {value} " in card.text
    assert "not measured again" in card.text


def test_the_encoder_has_no_scores():
    card = ModelCard(render_card("encoder"))
    assert card.data.eval_results is None
    assert "Published scores" not in card.text


@pytest.mark.parametrize("kind", RELEASES)
def test_what_a_card_must_say(kind):
    text = render_card(kind)
    for words in ("Apache-2.0", "research preview", "non-commercial", "o audio", "Biases", "pip install videollama3"):
        assert words in text
    assert "not measured on a GPU" in text
    assert ("Not built for real time" in text) == (FACTS["kinds"][kind]["modality"] == "video")


def test_the_other_layouts():
    assert "--to native --verify" in render_card("2B", layout="native")
    assert "trust_remote_code" not in render_card("2B", layout="native")
    assert "videollama3 convert" not in render_card("2B", layout="official")


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"Expected a kind of card out of 2B, 7B, .* got '3B'"):
        render_card("3B")
    with pytest.raises(ValueError, match="Expected the name of the checkpoint"):
        render_card("own")


# Figures


def test_parameter_counts_are_those_of_the_model():
    model = VideoLlama3ForCausalLM(tiny_config())
    sizes = sizes_of(model.config.to_dict())
    assert sizes.num_parameters() == model.num_parameters()
    encoder = VideoLlama3VisionModel(tiny_vision_config())
    assert sizes_of(encoder.config.to_dict()).num_vision_parameters() == encoder.num_parameters()
    tied = VideoLlama3ForCausalLM(tiny_config(tie_word_embeddings=True))
    assert sizes_of(tied.config.to_dict()).num_parameters() == tied.num_parameters()


def test_memory_is_that_of_the_derivation():
    # docs/memory.md: 180 frames of 364 patches beside a 7B take 20.2 GB; weights
    # 15.23 + 0.86. A cache forgotten would be 1.09 off, a gate of the MLP 0.63.
    sizes = release_sizes("7B")
    assert gigabytes(2 * sizes.num_parameters()) == "16.09"
    request = sizes.request_bytes(num_frames=180, num_patches=180 * 364, num_visual_tokens=180 * 91)
    assert (2 * sizes.num_parameters() + request) / 1e9 == pytest.approx(20.18, abs=0.01)
    assert "20.2" in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    # 58 frames a chunk, there.
    assert sizes.chunk_bytes(10**6) // 25344 // 364 == 58


def test_sizes_of_released_files():
    # Bytes on the Hub: 3.92 GB for the 2B in one file, 824 MB for the encoder.
    assert round(2 * release_sizes("2B").num_parameters() / 1e9, 2) == 3.92
    assert round(2 * release_sizes("encoder").num_vision_parameters() / 1e6) == 824


def test_tokens_are_those_of_the_processor(tmp_path, processor):
    path = write_clip(tmp_path / "clip.mp4", 75, 25, height=360, width=640)
    example = {"what": "clip", "frames": 3, "height": 360, "width": 640, "merge": 2}
    ((_, frames, of_each, tokens, _, _),) = budget_rows(release_sizes("2B"), [example], max_tokens=16384)
    estimate = processor.video_processor.estimate([path], fps=1)
    assert (frames, of_each) == ("3", "299")
    assert int(tokens) == estimate.num_visual_tokens


def test_a_config_without_sizes():
    with pytest.raises(ValueError, match=r"Expected a config.json of a VideoLLaMA3 .* without 'hidden_size'"):
        sizes_of({"model_type": "videollama3", "vision_config": {}})


# Snippets


def test_snippets_of_a_video_model(own_checkpoint, media_folder, capsys):
    _run_card(render_card("2B"), {"VideoLLaMA3-2B": own_checkpoint}, capsys, expected=3)


def test_snippets_of_an_image_model(own_checkpoint, media_folder, capsys):
    _run_card(render_card("7B-Image"), {"VideoLLaMA3-7B-Image": own_checkpoint}, capsys, expected=3)


def test_snippets_of_the_encoder(media_folder, capsys):
    folder = media_folder / "encoder"
    VideoLlama3VisionModel(tiny_vision_config()).save_pretrained(folder)
    VideoLlama3ImageProcessor().save_pretrained(folder)
    outputs = _run_card(render_card("encoder"), {"VL3-SigLIP-NaViT": folder}, capsys, expected=2)
    assert outputs[0] == "torch.Size([7, 5, 48])\n"


# peft reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_snippets_of_an_adapter(own_checkpoint, media_folder, capsys):
    peft = pytest.importorskip("peft")
    base = VideoLlama3ForCausalLM.from_pretrained(own_checkpoint)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    adapted.save_pretrained(media_folder / "adapter")
    blocks = fenced_blocks(render_card("own", name="adapter", training=TrainingFacts(base_model="tiny", adapter=True)))
    assert [language for language, _ in blocks] == ["python", "bash"]
    assert "PeftModel" in blocks[0][1]
    assert all(run_blocks(blocks, capsys))
    assert (media_folder / "adapter-merged" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["2B", "7B-Image"])
def test_the_conversion_of_a_card(kind, media_folder, capsys):
    """The command on the authors' layout, then the snippets on what it wrote."""
    name = FACTS["kinds"][kind]["name"]
    shutil.copytree(GOLDEN / "ckpt", media_folder / "DAMO-NLP-SG" / name)
    blocks = fenced_blocks(render_card(kind))
    convert = [block for block in blocks if "videollama3 convert" in block[1]]
    assert len(convert) == 1
    outputs = run_blocks([*convert, *(block for block in blocks if block not in convert)], capsys)
    assert len(outputs) == 4


def test_the_conversion_of_the_encoder(media_folder, capsys):
    VideoLlama3VisionModel(tiny_vision_config()).save_pretrained(media_folder / "ours")
    VideoLlama3ImageProcessor().save_pretrained(media_folder / "ours")
    (media_folder / "DAMO-NLP-SG").mkdir()
    assert main(["convert", "ours", "DAMO-NLP-SG/VL3-SigLIP-NaViT", "--to", "official", "--debug"]) == 0
    blocks = fenced_blocks(render_card("encoder"))
    assert "videollama3 convert" in blocks[-1][1]
    assert len(run_blocks([blocks[-1], *blocks[:-1]], capsys)) == 3


def _run_card(card, folders, capsys, *, expected):
    for name, folder in folders.items():
        folder.rename(folder.parent / name)
    blocks = [block for block in fenced_blocks(card) if "videollama3 convert" not in block[1]]
    assert len(blocks) == expected
    outputs = run_blocks(blocks, capsys)
    assert all(outputs)
    return outputs


# Into a folder


def test_the_command(tmp_path, capsys):
    folder = write_json(tmp_path / "converted" / "config.json", release_config("7B"))
    assert main(["card", str(folder), "--kind", "7B", "--name", "me/mine"]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'README.md'}\n"
    text = (folder / "README.md").read_text()
    assert 'from_pretrained("me/mine"' in text
    assert ModelCard(text).data.base_model == "DAMO-NLP-SG/VideoLLaMA3-7B"


def test_a_kind_in_doubt_is_asked_for(tmp_path, capsys):
    folder = write_json(tmp_path / "c" / "config.json", release_config("2B", "videollama3_qwen2"))
    assert main(["card", str(folder)]) == 1
    message = capsys.readouterr().err
    assert "are those of 2B and of 2B-Image" in message
    assert "--kind (2B, 2B-Image, or own" in message
    assert not (folder / "README.md").exists()


def test_a_certain_kind_is_found(tmp_path):
    vision = {"model_type": "videollama3_vision", **release_config("2B")["vision_config"]}
    folder = write_json(tmp_path / "c" / "config.json", vision)
    write_card(folder)
    assert "image-feature-extraction" in (folder / "README.md").read_text()
    assert kind_of(json.loads((GOLDEN / "ckpt" / "config.json").read_text()), None, folder=folder) == "own"
    assert kind_of(release_config("7B"), TrainingFacts(), folder=folder) == "own"


@pytest.mark.parametrize("model_type", ["videollama3", "videollama3_qwen2", "video_llama_3"])
def test_the_layout_of_the_folder(tmp_path, model_type):
    folder = write_json(tmp_path / "c" / "config.json", release_config("2B", model_type))
    write_card(folder, kind="2B")
    text = (folder / "README.md").read_text()
    assert ("--to native" in text) == (model_type == "video_llama_3")
    assert ("trust_remote_code" in text) == (model_type == "videollama3")


def test_a_kind_that_contradicts_the_sizes(own_checkpoint):
    with pytest.raises(ValueError, match=r"Expected the sizes of 2B in .*text_hidden=1536.*got .*text_hidden=64"):
        write_card(own_checkpoint, kind="2B")


def test_somebody_elses_card_is_kept(own_checkpoint):
    card = own_checkpoint / "README.md"
    card.write_text("# Mine\n")
    with pytest.raises(FileExistsError, match=r"README.md was not written by this command.*pass --overwrite"):
        write_card(own_checkpoint)
    assert card.read_text() == "# Mine\n"
    write_card(own_checkpoint, overwrite=True)
    assert is_own_card(card.read_text())
    write_card(own_checkpoint)  # our own is renewed without asking
    card.write_text(card.read_text().replace("No audio", "Audio"))
    with pytest.raises(FileExistsError, match="or was changed since"):
        write_card(own_checkpoint)


def test_a_card_that_was_never_written_is_nobodys(own_checkpoint):
    (own_checkpoint / "README.md").write_text("")
    write_card(own_checkpoint)
    assert is_own_card((own_checkpoint / "README.md").read_text())


def test_a_signature_holds_for_its_text_only():
    assert is_own_card(signed("one\n"))
    assert not is_own_card(signed("one\n").replace("one", "two"))
    assert not is_own_card("one\n")


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Expected a checkpoint with a config.json in .*, found none"):
        write_card(tmp_path)
    write_json(tmp_path / "config.json", {**release_config("2B"), "model_type": "llama"})
    with pytest.raises(ValueError, match=r"Expected a model_type out of .* got 'llama'"):
        write_card(tmp_path, kind="2B")


# After a training run


def test_a_training_run_fills_in_what_it_recorded(own_checkpoint):
    write_json(own_checkpoint / "training_record.json", RECORD)
    history = [{"step": 1, "loss": 2.5}, {"step": 9, "loss": 0.7}, {"step": 9, "train_loss": 0.9}]
    write_json(own_checkpoint / "trainer_state.json", {"global_step": 9, "epoch": 1.5, "log_history": history})
    written = write_card(own_checkpoint)
    assert [path.name for path in written] == ["README.md", "exact_match.yaml"]
    card = ModelCard.load(own_checkpoint / "README.md")
    assert card.data.base_model == RECORD["base_model"]
    assert card.data.base_model_relation == "finetune"
    assert card.data.datasets == ["someone/clips"]
    assert card.data.license == "apache-2.0"
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("someone/bench", "accuracy", 61.5)
    for row in (
        "| learning_rate | 1e-05 |",
        r"| note | a \| b |",
        "| data | someone/clips, rows.jsonl, more.jsonl |",
        "| training samples | 1234 |",
        "| samples left out | 3 |",
        "| optimizer steps | 9 |",
        "| epochs | 1.5 |",
        "| first logged loss | 2.5 (step 1) |",
        "| last logged loss | 0.75 |",  # the record's, not the state's
        "| mean loss of the run | 0.9 |",
        "| version of torch | 2.13.0 |",
        "| loss | 0.8 |",
        "| exact match | 61.5 |",
    ):
        assert row in card.text
    assert "somebody" not in card.text  # a path of the machine it was trained on
    assert "at most 2,048 visual tokens" in card.text  # the checkpoint's own limit
    assert "Published scores" not in card.text
    (entry,) = parse_entries(yaml.safe_load((own_checkpoint / ".eval_results" / "exact_match.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("someone/bench", "open", 61.5)


def test_what_is_not_known_is_not_in_the_card(own_checkpoint):
    write_card(own_checkpoint)
    card = ModelCard.load(own_checkpoint / "README.md")
    for name in ("license", "datasets", "base_model", "eval_results", "language"):
        assert card.data.get(name) is None
    assert "Nothing about the training of this checkpoint was recorded." in card.text
    assert "which checkpoint it started from was not recorded" in card.text
    for words in ("Licence", "None", "Published scores", "DAMO-NLP-SG", "learning"):
        assert words not in card.text.replace("the paper", "")


def test_pickles_are_left_alone(own_checkpoint):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("training_args.bin was unpickled",))

    torch.save(Trap(), own_checkpoint / "training_args.bin")
    write_card(own_checkpoint)


def test_an_adapter_names_its_base(tmp_path):
    folder = write_json(tmp_path / "a" / "adapter_config.json", {"base_model_name_or_path": RECORD["base_model"]})
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == (RECORD["base_model"], "adapter")
    assert card.data.library_name == "peft"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"recipe": [1]}, r"Expected 'recipe' in .*training_record.json as dict, got list: \[1\]"),
        ({"num_train_samples": True}, "Expected 'num_train_samples' in .* as int, got bool: True"),
        ({"final_train_loss": "low"}, "Expected 'final_train_loss' in .* as int or float, got str: 'low'"),
        ({"eval": {"x": "high"}}, "Expected a number as the value of eval 'x' in .*, got 'high'"),
        ([], "Expected a JSON object in .*training_record.json, got list"),
    ],
)
def test_a_bad_record(tmp_path, record, message):
    write_json(tmp_path / "training_record.json", record)
    with pytest.raises(ValueError, match=message):
        read_training(tmp_path)


def test_a_record_that_is_no_json(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match=r"Expected JSON in .*trainer_state.json, got something else"):
        read_training(tmp_path)
    assert read_training(tmp_path / "elsewhere") is None


def test_hub_ids_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name-1.5")
    (tmp_path / "runs" / "best").mkdir(parents=True)
    for name in ("runs/best", "rows/train.jsonl", "/abs/path", "name", "../up/there", "a/b/c"):
        assert not is_hub_id(name)


# In the package


def test_the_files_lie_in_the_package():
    folder = resources.files("videollama3.conversion")
    assert {"model_card_template.md", "model_card_facts.json"} <= {path.name for path in folder.iterdir()}


def test_the_command_offers_every_kind():
    from videollama3.conversion import card_command

    assert card_command._KINDS == KINDS
    assert isinstance(release_sizes("2B"), ModelSizes)
