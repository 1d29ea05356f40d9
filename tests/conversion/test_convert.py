"""Conversion between the three layouts: what goes in comes back, and nothing is lost on the way."""

import json
import shutil

import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.video_llama_3 import modeling_video_llama_3 as native

import videollama3
from videollama3.conversion.convert import convert_checkpoint
from videollama3.conversion.source_checkpoint import local_folder
from videollama3.conversion.tokenizer_files import OFFICIAL_CHAT_TEMPLATE
from videollama3.modeling.checkpoint_layouts import KEY_PREFIXES, to_official_name, to_plugin_name
from videollama3.processing.prompt_tokens import CHAT_TEMPLATE
from videollama3.random_checkpoint import build_random

from .twins import doubled, official, read_json, stored, with_equal_head, without_head

# Fields that each layout's own reader needs, and nothing of what was written there is looked at otherwise.
ROUND = ("plugin", "native", "plugin", "official")


def chain(source, folder, steps=ROUND, **options):
    """Converts on and on; returns the folders."""
    folders = []
    for i, to in enumerate(steps):
        convert_checkpoint(source, folder / f"{i}-{to}", to=to, **options)
        source = folder / f"{i}-{to}"
        folders.append(source)
    return folders


@pytest.fixture(scope="module")
def chained(golden_folder, tmp_path_factory):
    return chain(golden_folder / "ckpt", tmp_path_factory.mktemp("chain"))


# --- the key table ---


def test_the_table_works_both_ways():
    for row in KEY_PREFIXES:
        assert to_official_name(f"{row.ours}x.weight") == f"{row.official}x.weight"
        assert to_plugin_name(f"{row.official}x.weight") == f"{row.ours}x.weight"
        assert to_plugin_name(f"{row.ours}x.weight") == f"{row.ours}x.weight"
        if row.training:
            assert to_plugin_name(f"{row.training}x.weight") == f"{row.ours}x.weight"
    assert to_plugin_name("model.mm_projectors.x") == "model.mm_projectors.x"
    assert to_official_name("other.x") == "other.x"


# --- round trips ---


def test_round_trip_is_byte_identical(golden_folder, chained):
    source = stored(golden_folder / "ckpt")
    assert len(source) == 67
    assert stored(chained[-1]) == source
    # Not only per tensor: the whole file is the library's.
    assert (chained[-1] / "model.safetensors").read_bytes() == (golden_folder / "ckpt/model.safetensors").read_bytes()
    for folder in chained[:-1]:
        assert stored(folder) == {to_plugin_name(name): content for name, content in source.items()}


def test_round_trip_of_the_settings(golden_folder, chained):
    """Equal in meaning: every field of the golden twin is there with its value, others are defaults."""
    golden = golden_folder / "ckpt"
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json"):
        theirs, ours = read_json(golden / name), read_json(chained[-1] / name)
        assert {key: ours.get(key, "absent") for key in theirs if key != "vision_encoder_config"} == {
            key: value for key, value in theirs.items() if key != "vision_encoder_config"
        }, name
    theirs, ours = (read_json(folder / "config.json") for folder in (golden, chained[-1]))
    assert theirs["vision_encoder_config"].items() <= ours["vision_encoder_config"].items()
    assert ours["vision_encoder_config"].keys() - theirs["vision_encoder_config"].keys() == {"initializer_range"}
    assert ours.keys() - theirs.keys() == {"pad_token_id"}
    assert {path.name for path in chained[-1].iterdir()} == {path.name for path in golden.iterdir()}
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        assert (chained[-1] / name).read_bytes() == (golden / name).read_bytes()
    theirs, ours = (read_json(folder / "tokenizer_config.json") for folder in (golden, chained[-1]))
    assert {**theirs, "chat_template": 0} == {**ours, "chat_template": 0}


def test_configurations_mean_the_same_everywhere(golden_folder, chained):
    expected = videollama3.VideoLlama3Config.from_pretrained(golden_folder / "ckpt").to_dict()
    for folder in chained:
        config = videollama3.VideoLlama3Config.from_pretrained(folder).to_dict()
        for part in (config, config["text_config"], config["vision_config"]):
            part.pop("dtype", None)
            part.pop("transformers_version", None)
            part.pop("auto_map", None)
            part.pop("_name_or_path", None)
        for part in (expected, expected["text_config"], expected["vision_config"]):
            part.pop("dtype", None)
            part.pop("transformers_version", None)
            part.pop("auto_map", None)
            part.pop("_name_or_path", None)
        assert config == expected, folder.name


def test_processors_prepare_the_same_everywhere(golden_folder, chained):
    picture = torch.randint(0, 256, (90, 70, 3), dtype=torch.uint8).numpy()
    clip = torch.randint(0, 256, (3, 60, 80, 3), dtype=torch.uint8).numpy()
    content = [
        {"type": "image", "image": picture},
        {"type": "video", "video": clip, "timestamps": [0.0, 1.0, 2.5]},
        {"type": "text", "text": "What is <image>?"},
    ]
    conversation = [{"role": "user", "content": content}, {"role": "assistant", "content": "The video"}]

    def prepare(folder):
        processor = videollama3.VideoLlama3Processor.from_pretrained(folder)
        return processor(conversation=conversation, add_system_prompt=True, return_tensors="pt")

    expected = prepare(golden_folder / "ckpt")
    for folder in chained:
        got = prepare(folder)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items()), folder.name


def test_official_templates_render_alike(golden_folder, chained):
    """As the authors' processor renders them: with `image_token`, and frames and times of each video."""
    theirs = read_json(golden_folder / "ckpt" / "chat_template.json")["chat_template"]
    assert read_json(chained[-1] / "chat_template.json")["chat_template"] == OFFICIAL_CHAT_TEMPLATE != theirs
    conversation = [
        {
            "role": "user",
            "content": [
                "a",
                {"type": "image", "timestamp": 1.26},
                {"type": "image"},
                {"type": "video", "num_frames": 3, "timestamps": [0.04, 1.0, 2.25]},
                {"type": "video", "num_frames": 2},
                {"type": "text", "text": "b"},
            ],
        },
        {"role": "assistant", "content": "c"},
        {"role": "stream", "content": [{"type": "image", "timestamp": 2.0}]},
        {"role": "stream", "content": "d"},
        {"role": "assistant", "content": [{"type": "text", "text": "e"}]},
    ]
    for options in ({}, {"add_system_prompt": True, "add_generation_prompt": True}):
        texts = [
            Environment().from_string(template).render(messages=conversation, image_token="<image>", **options)
            for template in (theirs, OFFICIAL_CHAT_TEMPLATE)
        ]
        assert texts[0] == texts[1]
        assert "Time 1.3s: <image>\n<image>\nTime 0.0s:<image>,Time 1.0s:<image>,Time 2.2s:<image>\n" in texts[1]


def test_a_model_of_ours_gets_the_files_of_the_official_layout(tmp_path):
    """Saved by transformers 5, whose tokenizers have fewer files; settings that the authors do not know survive."""
    model, processor = build_random(hidden_size=32)
    processor.video_processor.compression_threshold = 0.3
    processor.video_processor.max_frames = 32
    processor.image_processor.merge_size = 2
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    folders = chain(tmp_path / "ours", tmp_path, ("official", "native", "plugin"))
    names = {path.name for path in folders[0].iterdir()}
    assert names >= {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.json"}
    config = read_json(folders[0] / "tokenizer_config.json")
    assert config["added_tokens_decoder"]["263"]["content"] == "<image>"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|stream_start|>" in config["additional_special_tokens"]
    assert read_json(folders[0] / "config.json")["image_token_index"] == 263
    assert stored(folders[2]) == stored(tmp_path / "ours")
    for folder in folders:
        again = videollama3.VideoLlama3Processor.from_pretrained(folder)
        assert again.video_processor.to_dict() | {"auto_map": 0} == processor.video_processor.to_dict() | {
            "auto_map": 0
        }
        assert again.image_processor.to_dict() | {"auto_map": 0} == processor.image_processor.to_dict() | {
            "auto_map": 0
        }
        text = "Time 0.0s:<|stream_start|> a<image>"
        assert again.tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    # Named by the Auto classes, too.
    assert AutoTokenizer.from_pretrained(folders[0])("<image>")["input_ids"] == [263]
    assert type(AutoProcessor.from_pretrained(folders[0])) is videollama3.VideoLlama3Processor


def test_another_template_is_copied(golden_folder, tmp_path):
    source = official(golden_folder, tmp_path / "source")
    for name in ("chat_template.json", "tokenizer_config.json"):
        content = read_json(source / name)
        (source / name).write_text(json.dumps({**content, "chat_template": "{{ messages[0]['content'] }}"}))
    report = convert_checkpoint(source, tmp_path / "plugin", to="plugin")
    assert report.remarks == ("the chat template is not the released models': copied as it is",)
    assert (tmp_path / "plugin" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


# --- what may stand in a source ---


def test_a_training_checkpoint(golden_folder, tmp_path, chained):
    source = official(golden_folder, tmp_path / "source", doubled)
    report = convert_checkpoint(source, tmp_path / "plugin", to="plugin")
    assert stored(tmp_path / "plugin") == stored(chained[0])
    assert report.remarks == ("names of the authors' training code",)


@pytest.mark.parametrize("count", [1, 3])
def test_torch_files(golden_folder, tmp_path, chained, count):
    source = official(golden_folder, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if count == 1:
        torch.save(weights, source / "pytorch_model.bin")
    else:
        weight_map = {}
        for i in range(count):
            part = {name: weights[name] for name in sorted(weights)[i::count]}
            torch.save(part, source / f"pytorch_model-{i}.bin")
            weight_map.update(dict.fromkeys(part, f"pytorch_model-{i}.bin"))
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_checkpoint(source, tmp_path / "plugin", to="plugin")
    assert stored(tmp_path / "plugin") == stored(chained[0])


@pytest.mark.parametrize(
    ("change", "tie", "head", "stored_head"),
    [
        (without_head, True, "tied", False),
        (with_equal_head, True, "tied, stored twice", True),
        (lambda weights: weights, True, "own", True),
        (with_equal_head, False, "own", True),
    ],
    ids=["tied", "tied and stored", "an own head wins", "own but equal"],
)
def test_heads(golden_folder, tmp_path, change, tie, head, stored_head):
    source = official(golden_folder, tmp_path / "source", change, tie_word_embeddings=tie)
    folders = chain(source, tmp_path)
    assert stored(folders[-1]) == stored(source)
    for folder in folders:
        assert ("lm_head.weight" in stored(folder)) is stored_head
        config = read_json(folder / "config.json")
        assert config["tie_word_embeddings"] is (head != "own")
    report = convert_checkpoint(source, tmp_path / "report", to="native", verify=True)
    assert report.head == head
    twin = native.VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "report")
    shared = twin.lm_head.weight is twin.model.language_model.embed_tokens.weight
    assert shared is (head != "own")


@pytest.mark.parametrize("names", ["official", "training", "plugin"])
def test_the_encoder_alone(golden_folder, tmp_path, names):
    encoder = videollama3.VideoLlama3VisionModel.from_pretrained(golden_folder / "ckpt")
    source = tmp_path / "source"
    if names == "plugin":
        encoder.save_pretrained(source)
        source_layout = "plugin"
    else:
        source.mkdir()
        config = read_json(golden_folder / "ckpt" / "config.json")["vision_encoder_config"]
        (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
        prefix = "vision_encoder." if names == "training" else ""
        weights = {f"{prefix}{name}": tensor for name, tensor in encoder.state_dict().items()}
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        source_layout = "official"
    shutil.copyfile(golden_folder / "ckpt/preprocessor_config.json", source / "preprocessor_config.json")
    report = convert_checkpoint(source, tmp_path / "check", to="native", verify=True)
    assert (report.head, report.source_layout) == ("none", source_layout)
    assert 0 <= report.largest_difference < 1e-5
    folders = chain(source, tmp_path)
    expected = encoder.state_dict()
    for folder in folders:
        assert stored(folder).keys() == expected.keys()
        loaded = videollama3.VideoLlama3VisionModel.from_pretrained(folder)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
        processor = videollama3.VideoLlama3ImageProcessor.from_pretrained(folder)
        assert (processor.merge_size, processor.max_tokens) == (1, 16384)
    assert {path.name for path in folders[-1].iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert read_json(folders[-1] / "config.json")["model_type"] == "videollama3_vision_encoder"
    assert read_json(folders[1] / "config.json")["architectures"] == ["VideoLlama3VisionModel"]
    twin = native.VideoLlama3VisionModel.from_pretrained(folders[1])
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in expected.items())


def test_weights_and_configuration_alone(golden_folder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden_folder / "ckpt" / name, source / name)
    # There is no tokenizer to look them up in.
    config = {**read_json(source / "config.json"), "image_token_id": 308, "video_token_id": 309}
    (source / "config.json").write_text(json.dumps(config))
    convert_checkpoint(source, tmp_path / "official", to="official", verify=True)
    written = read_json(tmp_path / "official" / "config.json")
    assert (written["image_token_id"], written["video_token_id"]) == (308, 309)
    report = convert_checkpoint(source, tmp_path / "native", to="native", verify=True)
    assert report.remarks == ("no processor: the source has no complete set of tokenizer and preprocessor files",)
    assert {path.name for path in (tmp_path / "native").iterdir()} == {"config.json", "model.safetensors"}


# --- every key ---


def test_everything_that_does_not_fit_is_in_one_error(golden_folder, tmp_path):
    def spoil(weights):
        del weights["model.mm_projector.readout.2.bias"], weights["model.layers.0.mlp.up_proj.weight"]
        weights["model.more.weight"] = torch.zeros(2)
        weights["model.vision_encoder.head.probe"] = torch.zeros(1)
        weights["model.norm.weight"] = torch.zeros(65)
        return weights

    source = official(golden_folder, tmp_path / "source", spoil)
    with pytest.raises(ValueError, match=r"Expected exactly the weights that config\.json describes") as caught:
        convert_checkpoint(source, tmp_path / "out", to="plugin")
    assert str(caught.value).split("; ", 1)[1] == (
        "2 missing: model.language_model.layers.0.mlp.up_proj.weight, model.projector.readout.2.bias; "
        "2 without a place: model.more.weight, model.vision_encoder.head.probe; "
        "1 of another shape: model.norm.weight [64], got [65]."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_weight_under_two_names(golden_folder, tmp_path):
    source = official(
        golden_folder,
        tmp_path / "source",
        lambda weights: {**weights, **{name: t.clone() for name, t in doubled(weights).items()}},
    )
    with pytest.raises(ValueError, match=r"Expected each weight once in .*, got 'model\.vision_model\."):
        convert_checkpoint(source, tmp_path / "out", to="plugin")


def test_a_head_that_is_missing(golden_folder, tmp_path):
    source = official(golden_folder, tmp_path / "source", without_head, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"; 1 missing: lm_head\.weight\.$"):
        convert_checkpoint(source, tmp_path / "out", to="plugin")


def test_not_a_number(golden_folder, tmp_path):
    def spoil(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        return weights

    source = official(golden_folder, tmp_path / "source", spoil)
    with pytest.raises(ValueError, match=r"got NaN in 'model.layers.1.mlp.up_proj.weight' of '.*model.safetensors'"):
        convert_checkpoint(source, tmp_path / "out", to="plugin")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_links_out_of_the_source(golden_folder, tmp_path):
    source = official(golden_folder, tmp_path / "source")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (source / "generation_config.json").unlink()
    (source / "generation_config.json").symlink_to("../secret.json")
    with pytest.raises(ValueError, match=r"'.*generation_config.json' to be a file of its own folder, got a link to"):
        convert_checkpoint(source, tmp_path / "out", to="plugin")


def test_code_of_the_source_is_neither_run_nor_copied(golden_folder, tmp_path):
    source = official(golden_folder, tmp_path / "source")
    mark = tmp_path / "was here"
    for name in ("configuration_videollama3.py", "modeling_videollama3.py", "processing_videollama3.py"):
        (source / name).write_text(f"open({str(mark)!r}, 'w')\n")
    (source / "tokenization_x.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = read_json(source / "tokenizer_config.json")
    (source / "tokenizer_config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}})
    )
    convert_checkpoint(source, tmp_path / "out", to="official", verify=True)
    assert not mark.exists()
    assert not list((tmp_path / "out").glob("*.py"))


# --- dtype and shards ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(golden_folder, tmp_path, dtype):
    report = convert_checkpoint(golden_folder / "ckpt", tmp_path / "out", to="plugin", dtype=dtype, verify=True)
    assert report.largest_difference == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(golden_folder / "ckpt" / "model.safetensors").items():
        assert torch.equal(weights[to_plugin_name(name)], tensor.to(getattr(torch, dtype)))
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype
    convert_checkpoint(tmp_path / "out", tmp_path / "official", to="official")
    assert read_json(tmp_path / "official" / "config.json")["torch_dtype"] == dtype
    assert stored(tmp_path / "official") == {
        to_official_name(name): content for name, content in stored(tmp_path / "out").items()
    }


def test_values_that_a_dtype_cannot_hold(golden_folder, tmp_path):
    def large(weights):
        weights["model.norm.weight"][2] = 70000.0
        return weights

    source = official(golden_folder, tmp_path / "source", large)
    with pytest.raises(ValueError, match=r"values of 'model.norm.weight' that fit into float16, got 7e\+04: bfloat16"):
        convert_checkpoint(source, tmp_path / "out", to="plugin", dtype="float16")


def test_dtypes_side_by_side(golden_folder, tmp_path):
    def mix(weights):
        return {name: t.bfloat16() if "norm" in name or "bias" in name else t for name, t in weights.items()}

    source = official(golden_folder, tmp_path / "source", mix)
    folders = chain(source, tmp_path)
    assert stored(folders[-1]) == stored(source)


def test_shards(golden_folder, tmp_path, chained):
    report = convert_checkpoint(golden_folder / "ckpt", tmp_path / "out", to="native", max_shard_size="150KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == report.num_shards > 5
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert stored(tmp_path / "out") == stored(chained[1])
    for name in files:
        content = load_file(tmp_path / "out" / name)
        assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= 150_000
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert (
        index["metadata"]["total_size"]
        == report.num_bytes
        == sum(len(entry[2]) for entry in stored(chained[1]).values())
    )
    native.VideoLlama3ForConditionalGeneration.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("size", ["", "5", "0", "0GB", "GB", "-5GB", "5TB", "5 apples"])
def test_sizes_of_shards(golden_folder, tmp_path, size):
    if size == "5":
        report = convert_checkpoint(golden_folder / "ckpt", tmp_path / "out", to="plugin", max_shard_size=size)
        assert report.num_shards == report.num_tensors == 67
        return
    with pytest.raises(ValueError, match=f"Expected a size such as 5GB or 300MB, got '{size}'"):
        convert_checkpoint(golden_folder / "ckpt", tmp_path / "out", to="plugin", max_shard_size=size)


# --- the native result ---


def test_native_runs_in_transformers_own_class(model, chained, processor):
    """Loaded by its own name; same ids, same tensors, same logits."""
    config = read_json(chained[1] / "config.json")
    assert (config["model_type"], config["architectures"]) == (
        "video_llama_3",
        ["VideoLlama3ForConditionalGeneration"],
    )
    twin, info = native.VideoLlama3ForConditionalGeneration.from_pretrained(chained[1], output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    content = [
        {"type": "image", "image": torch.full((60, 40, 3), 90, dtype=torch.uint8).numpy()},
        {"type": "text", "text": "What?"},
    ]
    inputs = processor(conversation=[{"role": "user", "content": content}], return_tensors="pt")
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, twin.eval()(**inputs).logits
    # Measured 7e-6 of 5; a projector bias left out moves them by 0.1.
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_native_processor(chained):
    """transformers' own, where torchvision is there; the picture processor works without."""
    pytest.importorskip("torchvision")
    from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor

    theirs = VideoLlama3Processor.from_pretrained(chained[1])
    ours = videollama3.VideoLlama3Processor.from_pretrained(chained[1])
    assert theirs.image_processor.size["longest_edge"] == 16384 * 14 * 14
    assert theirs.video_processor.size["shortest_edge"] == 16 * 28 * 28
    assert (theirs.video_processor.merge_size, theirs.image_processor.merge_size) == (2, 1)
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert theirs.apply_chat_template(conversation) == ours.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "What?"}]}]
    )


def test_native_picture_processor(chained):
    from PIL import Image
    from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

    theirs = VideoLlama3ImageProcessorPil.from_pretrained(chained[1])
    assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == (16 * 196, 16384 * 196)
    assert (theirs.patch_size, theirs.merge_size, list(theirs.image_mean)) == (14, 1, [0.5, 0.5, 0.5])
    ours = videollama3.VideoLlama3ImageProcessor.from_pretrained(chained[1])
    picture = Image.fromarray(torch.randint(0, 256, (84, 140, 3), dtype=torch.uint8).numpy())
    got, expected = theirs(picture, return_tensors="pt"), ours(picture)
    assert torch.equal(got["image_grid_thw"], expected["image_grid_thw"])
    # Measured 2.4e-7: the order of scaling and normalising.
    torch.testing.assert_close(got["pixel_values"], expected["pixel_values"], atol=1e-6, rtol=0)


# --- verification, and what is refused ---


def test_verification_sees_a_difference(golden_folder, tmp_path, monkeypatch):
    from videollama3.conversion import convert

    written = convert.write_weights

    def spoil(folder, streams, **options):
        names = written(folder, streams, **options)
        weights = load_file(f"{folder}/model.safetensors")
        weights["model.projector.readout.2.bias"] += 0.01
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return names

    monkeypatch.setattr(convert, "write_weights", spoil)
    with pytest.raises(
        ValueError, match=r"up to 0\.0001 of the largest, got a difference of \d\.\d\de-0[123]: nothing was"
    ):
        convert_checkpoint(golden_folder / "ckpt", tmp_path / "out", to="plugin", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_refused(golden_folder, tmp_path):
    source = official(golden_folder, tmp_path / "source", model_type="qwen2")
    with pytest.raises(ValueError, match=r"Expected a model_type of videollama3, .* in '.*source', got 'qwen2'"):
        convert_checkpoint(source, tmp_path / "out", to="plugin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx"}, "Expected to= one of plugin, official, native, got 'onnx'"),
        ({"to": "plugin", "dtype": "int8"}, "Expected dtype= one of float32, bfloat16, float16, got 'int8'"),
        ({"to": "plugin", "base": "x"}, "Expected --base only with an adapter, got a whole checkpoint"),
    ],
)
def test_arguments(golden_folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(golden_folder / "ckpt", tmp_path / "out", **options)


def test_source_and_destination_in_one_another(golden_folder, tmp_path):
    source = official(golden_folder, tmp_path / "source")
    for destination in (source, source / "inside", tmp_path):
        with pytest.raises(ValueError, match="Expected a destination apart from the source"):
            convert_checkpoint(source, destination, to="plugin", overwrite=True)


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "absent", "a/b/c"])
def test_sources_that_are_not_there(name):
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint folder or a Hub id such as owner/name, got"):
        local_folder(name)


def test_a_hub_id(golden_folder, tmp_path, monkeypatch, chained):
    """Offline, from the Hub's cache: links into blobs."""
    import huggingface_hub

    repository = tmp_path / "models--some--one"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for path in (golden_folder / "ckpt").iterdir():
        shutil.copyfile(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **kwargs: download(*args, cache_dir=tmp_path, local_files_only=True, **kwargs),
    )
    convert_checkpoint("some/one", tmp_path / "out", to="plugin")
    assert stored(tmp_path / "out") == stored(chained[0])


def test_plugin_folder_is_what_save_pretrained_writes(chained, tmp_path):
    model = videollama3.VideoLlama3ForCausalLM.from_pretrained(chained[0])
    model.save_pretrained(tmp_path)
    videollama3.VideoLlama3Processor.from_pretrained(chained[0]).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        assert (chained[0] / path.name).read_bytes() == path.read_bytes()
    written, converted = (read_json(folder / "config.json") for folder in (tmp_path, chained[0]))
    for part in (written["text_config"], written["vision_config"]):
        part.pop("dtype", None)
    assert converted == written
    assert read_json(chained[0] / "processor_config.json") == read_json(tmp_path / "processor_config.json")
    assert (
        (chained[0] / "chat_template.jinja").read_text()
        == CHAT_TEMPLATE
        == (tmp_path / "chat_template.jinja").read_text()
    )
