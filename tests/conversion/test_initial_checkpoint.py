"""New checkpoints out of parts: twins of every source layout, each built by the code that writes it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.conftest import GOLDEN
from tests.hub.hub_cache import as_hub_cache
from tests.media import write_clip
from tests.modeling.test_native_oracle import native_twin
from videollama3 import VideoLlama3ForCausalLM, VideoLlama3Processor, VideoLlama3VisionModel
from videollama3.cli import main
from videollama3.conversion.initial_checkpoint import build_initial_checkpoint
from videollama3.random_checkpoint import SPECIAL_TOKENS, byte_tokenizer

OFFICIAL_ENCODER = "model.vision_encoder."
# Of Qwen2.5, before VideoLLaMA3 adds its own.
QWEN_TOKENS = SPECIAL_TOKENS[:7]
# One token per byte, then the special tokens.
FIRST_ADDED = 256 + len(QWEN_TOKENS)


def qwen_tokenizer(special_tokens=QWEN_TOKENS):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bytes_only(), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in special_tokens if t != "<|endoftext|>"]})
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def _bytes_only():
    """The backend of `byte_tokenizer` without its special tokens."""
    from tokenizers import Tokenizer

    content = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))


def write_llm(folder, *, rows=300, tied=False, tokenizer=None, stops=263, **config):
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=256,
            **config,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=256, repetition_penalty=1.05)
    model.save_pretrained(folder)
    (tokenizer or qwen_tokenizer()).save_pretrained(folder)
    return folder


def siglip_vision_config(**changes):
    fields = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 56,
        "patch_size": 14,
    }
    return SiglipVisionConfig(**{**fields, **changes})


def write_siglip(folder, **changes):
    torch.manual_seed(2)
    model = SiglipVisionModel(siglip_vision_config(**changes))
    model.save_pretrained(folder)
    return folder


def write_siglip_pair(folder):
    torch.manual_seed(3)
    text = SiglipTextConfig(
        vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=3
    )
    SiglipModel(SiglipConfig(text_config=text, vision_config=siglip_vision_config())).save_pretrained(folder)
    SiglipImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.2, 0.1]).save_pretrained(folder)
    return folder


def write_official_encoder(folder):
    """The encoder of the golden checkpoint, as VL3-SigLIP-NaViT stores it."""
    folder.mkdir()
    config = json.loads((GOLDEN / "ckpt" / "config.json").read_text())["vision_encoder_config"]
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Videollama3VisionEncoderModel"]}))
    weights = load_file(GOLDEN / "ckpt" / "model.safetensors")
    save_file(
        {name.removeprefix(OFFICIAL_ENCODER): w for name, w in weights.items() if name.startswith(OFFICIAL_ENCODER)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copy(GOLDEN / "ckpt" / "preprocessor_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return write_siglip(tmp_path_factory.mktemp("siglip"))


def stored(folder):
    return load_file(folder / "model.safetensors")


def bare(weights):
    """A source's encoder weights under the encoder's own names; what it must not have is left out."""
    names = {name.removeprefix("vision_model."): name for name in weights if not name.startswith("text_model.")}
    unwanted = ("embeddings.position_embedding.", "head.", "logit_")
    return {own: weights[name] for own, name in names.items() if not own.startswith(unwanted)}


def assert_parts(folder, *, encoder, llm):
    """The stored model consists of these weights, bit for bit, and of a projector."""
    model, info = VideoLlama3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {name: found for name, found in info.items() if found} == {}
    found = model.model.vision_model.state_dict()
    assert found.keys() == encoder.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, encoder[name]), name
    expected = Qwen2ForCausalLM.from_pretrained(llm).state_dict()
    for name, tensor in expected.items():
        own = model.lm_head.weight if name == "lm_head.weight" else model.model.language_model.state_dict()[name[6:]]
        assert torch.equal(own[: tensor.shape[0]], tensor), name
    assert len(model.state_dict()) == len(found) + len(expected) + 4
    return model


# --- sources of the encoder ---


def test_a_siglip_encoder(siglip, llm, tmp_path):
    out = tmp_path / "new"
    report = build_initial_checkpoint(siglip, llm, out)
    weights = stored(siglip)
    assert any("position_embedding" in name for name in weights)
    assert any("head." in name for name in weights)
    model = assert_parts(out, encoder=bare(weights), llm=llm)
    assert report.dropped == ("position embedding (1 tensor)", "pooling head (11 tensors)")
    assert report.num_parameters == {
        "encoder": sum(w.numel() for w in bare(weights).values()),
        "projector": 48 * 32 + 32 + 32 * 32 + 32,
        "language model": sum(w.numel() for w in stored(llm).values()),
    }
    assert model.config.text_config.vocab_size == report.num_rows == report.num_rows_before == 300
    # As `VideoLlama3ForCausalLM` initialises it: 1536 and 1024 draws of standard deviation 0.02.
    for layer in (model.model.projector.readout[0], model.model.projector.readout[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert torch.equal(layer.bias, torch.zeros_like(layer.bias))


def test_the_vision_half_of_a_siglip_pair(llm, tmp_path):
    source = write_siglip_pair(tmp_path / "pair")
    report = build_initial_checkpoint(source, llm, tmp_path / "new")
    weights = stored(source)
    text = sum(name.startswith(("text_model.", "logit_")) for name in weights)
    assert text > 10
    model = assert_parts(tmp_path / "new", encoder=bare(weights), llm=llm)
    assert report.encoder_model_type == "siglip"
    assert f"text tower ({text} tensors)" in report.dropped
    assert {group.split(" (")[0] for group in report.dropped} == {"position embedding", "pooling head", "text tower"}
    # Mean and std are what the encoder was trained with, for floats and for uint8 pixels.
    assert model.config.vision_config.image_mean == [0.4, 0.5, 0.6]
    processor = VideoLlama3Processor.from_pretrained(tmp_path / "new")
    for part in (processor.image_processor, processor.video_processor):
        assert (part.image_mean, part.image_std) == ([0.4, 0.5, 0.6], [0.3, 0.2, 0.1])


def test_an_official_encoder(llm, model, tmp_path):
    source = write_official_encoder(tmp_path / "navit")
    report = build_initial_checkpoint(source, llm, tmp_path / "new")
    assert_parts(tmp_path / "new", encoder=model.model.vision_model.state_dict(), llm=llm)
    assert (report.encoder_model_type, report.dropped) == ("videollama3_vision_encoder", ())


def test_an_encoder_that_this_package_saved(llm, model, tmp_path):
    model.model.vision_model.save_pretrained(tmp_path / "encoder")
    report = build_initial_checkpoint(tmp_path / "encoder", llm, tmp_path / "new")
    assert_parts(tmp_path / "new", encoder=model.model.vision_model.state_dict(), llm=llm)
    assert report.encoder_model_type == "videollama3_vision"


@pytest.mark.parametrize("layout", ["official", "plugin", "native"])
def test_the_encoder_of_another_videollama3(llm, model, tmp_path, layout):
    source = GOLDEN / "ckpt"
    if layout != "official":
        source = tmp_path / layout
        (model if layout == "plugin" else native_twin(model)).save_pretrained(source)
    report = build_initial_checkpoint(None, llm, tmp_path / "new", vision_from=source)
    assert_parts(tmp_path / "new", encoder=model.model.vision_model.state_dict(), llm=llm)
    assert report.dropped == ("language model and projector",)


def test_other_patches_and_norms_are_carried_over_and_said(llm, tmp_path):
    source = write_siglip(tmp_path / "base", patch_size=16, image_size=64, layer_norm_eps=1e-5)
    report = build_initial_checkpoint(source, llm, tmp_path / "new")
    assert report.encoder_unusual == (
        "patch_size 16 (released encoder: 14)",
        "layer_norm_eps 1e-05 (released encoder: 1e-06)",
    )
    model = VideoLlama3ForCausalLM.from_pretrained(tmp_path / "new").eval()
    processor = VideoLlama3Processor.from_pretrained(tmp_path / "new")
    assert processor.image_processor.patch_size == processor.video_processor.patch_size == 16
    clip = write_clip(tmp_path / "clip.mp4", 50, 25)
    inputs = processor(conversation=question(clip), add_generation_prompt=True, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape[1] == 3 * 16 * 16
    assert model(**inputs).logits.isfinite().all()


# --- the language model ---


def question(clip):
    return [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_says_what_it_said(siglip, tmp_path, tied):
    llm = write_llm(tmp_path / "llm", tied=tied)
    out = tmp_path / "new"
    report = build_initial_checkpoint(siglip, llm, out)
    source = Qwen2ForCausalLM.from_pretrained(llm).eval()
    model = VideoLlama3ForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(llm)
    ids = tokenizer("<|im_start|>user\nWhat is this?<|im_end|>\n", return_tensors="pt")["input_ids"]
    assert torch.equal(
        VideoLlama3Processor.from_pretrained(out).tokenizer(
            "<|im_start|>user\nWhat is this?<|im_end|>\n", return_tensors="pt"
        )["input_ids"],
        ids,
    )
    assert torch.equal(model(input_ids=ids).logits, source(input_ids=ids).logits)
    assert report.tied is tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert ("lm_head.weight" in stored(out)) is not tied


def test_a_clip_is_asked_about(siglip, llm, tmp_path):
    build_initial_checkpoint(siglip, llm, tmp_path / "new")
    model = VideoLlama3ForCausalLM.from_pretrained(tmp_path / "new").eval()
    processor = VideoLlama3Processor.from_pretrained(tmp_path / "new")
    clip = write_clip(tmp_path / "clip.mp4", 75, 25)
    inputs = processor(
        conversation=question(clip), add_system_prompt=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == model.config.video_token_id).sum()) == int(
        inputs["video_compression_mask"].sum()
    )
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert 1 <= len(new) <= 4
    assert processor.video_processor.max_frames == 180
    assert processor.video_processor.merge_size == 2
    assert processor.image_processor.max_tokens == 16384


def test_tokens_take_rows_that_the_embedding_has(siglip, llm, tmp_path):
    report = build_initial_checkpoint(siglip, llm, tmp_path / "new")
    added = {token: FIRST_ADDED + i for i, token in enumerate(("<image>", "<|stream_start|>", "<|stream_end|>"))}
    assert report.added_tokens == added
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    for token, token_id in added.items():
        assert tokenizer(token)["input_ids"] == [token_id]
        assert tokenizer.added_tokens_decoder[token_id].special
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    vocabulary = tokenizer.get_vocab()
    assert config["image_token_id"] == vocabulary["<|image_pad|>"] == 261
    assert config["video_token_id"] == vocabulary["<|video_pad|>"] == 262


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("spare", "rows"), [(0, 266), (2, 266), (3, 266), (4, 267)])
def test_the_embedding_grows_only_where_the_tokenizer_outgrows_it(siglip, tmp_path, spare, rows, tied):
    llm = write_llm(tmp_path / "llm", rows=FIRST_ADDED + spare, tied=tied)
    report = build_initial_checkpoint(siglip, llm, tmp_path / "new", seed=5)
    assert (report.num_rows_before, report.num_rows) == (FIRST_ADDED + spare, rows)
    model = assert_parts(tmp_path / "new", encoder=bare(stored(siglip)), llm=llm)
    assert model.config.text_config.vocab_size == model.lm_head.weight.shape[0] == rows
    fresh = model.get_input_embeddings().weight[FIRST_ADDED + spare :]
    assert fresh.shape[0] == max(0, 3 - spare)
    # transformers draws them about the mean of the old ones: none is zero, none far away.
    assert fresh.abs().sum(dim=1).gt(0).all()
    assert (fresh.abs() < 0.1).all()


def test_placeholders_are_added_to_a_tokenizer_without_them(siglip, tmp_path):
    llm = write_llm(tmp_path / "llm", tokenizer=qwen_tokenizer(QWEN_TOKENS[:3]))
    report = build_initial_checkpoint(siglip, llm, tmp_path / "new")
    assert report.added_tokens == {
        "<|image_pad|>": 259,
        "<|video_pad|>": 260,
        "<image>": 261,
        "<|stream_start|>": 262,
        "<|stream_end|>": 263,
    }
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert (config["image_token_id"], config["video_token_id"]) == (259, 260)


def test_generation_settings_are_kept_and_answers_end(siglip, tmp_path):
    end = 258
    for stops, expected, added in ((end, end, None), (256, [256, end], "<|im_end|>"), ([256, end], [256, end], None)):
        llm = write_llm(tmp_path / "llm", stops=stops)
        report = build_initial_checkpoint(siglip, llm, tmp_path / "new")
        settings = json.loads((tmp_path / "new" / "generation_config.json").read_text())
        assert (settings["eos_token_id"], settings["repetition_penalty"]) == (expected, 1.05)
        assert report.added_stop_token == added
        shutil.rmtree(tmp_path / "llm")
        shutil.rmtree(tmp_path / "new")


# --- weights' dtype, seed, and the folder ---


def test_dtypes(siglip, tmp_path):
    torch.manual_seed(4)
    llm = write_llm(tmp_path / "llm")
    Qwen2ForCausalLM.from_pretrained(llm, dtype="bfloat16").save_pretrained(llm)
    report = build_initial_checkpoint(siglip, llm, tmp_path / "auto")
    assert (report.dtype, report.encoder_dtype, report.llm_dtype) == ("bfloat16", "float32", "bfloat16")
    assert {w.dtype for w in stored(tmp_path / "auto").values()} == {torch.bfloat16}
    assert "cast from float32 to bfloat16" in str(report)
    report = build_initial_checkpoint(siglip, llm, tmp_path / "wide", dtype=torch.float32)
    assert report.dtype == "float32"
    wide = stored(tmp_path / "wide")
    assert {w.dtype for w in wide.values()} == {torch.float32}
    for name, weight in bare(stored(siglip)).items():
        assert torch.equal(wide[f"model.vision_model.{name}"], weight), name
    for name, weight in stored(tmp_path / "auto").items():
        assert torch.equal(wide[name].to(torch.bfloat16), weight), name
    with pytest.raises(ValueError, match=r"Expected dtype 'auto', 'float32', .*, got 'int8'"):
        build_initial_checkpoint(siglip, llm, tmp_path / "no", dtype="int8")


def test_the_seed_decides_the_projector_alone(siglip, llm, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)
        build_initial_checkpoint(siglip, llm, tmp_path / name, seed=seed)
    a, b, c = (stored(tmp_path / name) for name in "abc")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    different = {name for name in a if not torch.equal(a[name], c[name])}
    assert different == {"model.projector.readout.0.weight", "model.projector.readout.2.weight"}
    assert a.keys() == b.keys() == c.keys()


def test_the_folder_says_nothing_of_where_it_was_made(siglip, llm, tmp_path):
    build_initial_checkpoint(siglip, llm, tmp_path / "deep" / "new")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]
    for path in (tmp_path / "deep" / "new").glob("*.json*"):
        text = path.read_text()
        for source in (siglip, llm, tmp_path):
            assert str(source) not in text, path.name
    assert (tmp_path / "deep" / "new" / "modeling_videollama3.py").is_file()
    assert "{{ messages }}" not in (tmp_path / "deep" / "new" / "chat_template.jinja").read_text()


def test_a_folder_with_something_in_it_is_refused(siglip, llm, tmp_path):
    out = tmp_path / "new"
    out.mkdir()
    build_initial_checkpoint(siglip, llm, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match=r"Expected a new or empty folder for the checkpoint, got .*new"):
        build_initial_checkpoint(siglip, llm, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interrupted_run_leaves_nothing(siglip, llm, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoLlama3Processor, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_initial_checkpoint(siglip, llm, tmp_path / "out" / "new")
    assert list((tmp_path / "out").iterdir()) == []


# --- what does not fit ---


def test_exactly_one_encoder(siglip, llm, tmp_path):
    for vision, vision_from in ((None, None), (siglip, siglip)):
        with pytest.raises(ValueError, match="Expected exactly one of vision and vision_from"):
            build_initial_checkpoint(vision, llm, tmp_path / "new", vision_from=vision_from)


def test_other_kinds_of_checkpoints(siglip, llm, model, tmp_path):
    model.model.vision_model.save_pretrained(tmp_path / "encoder")
    out = tmp_path / "new"
    with pytest.raises(ValueError, match=r"got 'qwen2': no other encoder"):
        build_initial_checkpoint(llm, llm, out)
    with pytest.raises(ValueError, match=r"got 'videollama3_qwen2': it is a whole VideoLLaMA3, pass it as --vision-f"):
        build_initial_checkpoint(GOLDEN / "ckpt", llm, out)
    with pytest.raises(ValueError, match=r"got 'videollama3_vision': it is an encoder alone, pass it as --vision\."):
        build_initial_checkpoint(None, llm, out, vision_from=tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"Expected a Qwen2 or Qwen2\.5 language model .* got model_type 'siglip_vis"):
        build_initial_checkpoint(siglip, siglip, out)
    assert not out.exists()


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_quantized_language_model(siglip, tmp_path):
    llm = write_llm(tmp_path / "llm")
    rewrite_config(llm, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"Expected plain weights in .*llm', got a quantized checkpoint"):
        build_initial_checkpoint(siglip, llm, tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_channels": 1}, r"with 3 channels in .*, got num_channels 1"),
        ({"hidden_act": "no_such"}, r"hidden_act that transformers knows in .*, got 'no_such'"),
        ({"num_attention_heads": 24}, r"multiple of 4 \* `num_attention_heads`.*got 48 and 24 heads"),
        ({"patch_size": [14, 16]}, r"Expected square patches in .*, got patch_size [\[(]14, 16"),
    ],
)
def test_encoders_that_do_not_fit(llm, tmp_path, changes, message):
    source = write_siglip(tmp_path / "siglip")
    rewrite_config(source, **changes)
    with pytest.raises(ValueError, match=message):
        build_initial_checkpoint(source, llm, tmp_path / "new")


def test_every_weight_is_filled_or_named(siglip, tmp_path):
    broken = tmp_path / "siglip"
    shutil.copytree(siglip, broken)
    weights = stored(broken)
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in weights) else ""
    del weights[f"{prefix}encoder.layers.1.mlp.fc1.bias"]
    weights[f"{prefix}post_layernorm.weight"] = torch.ones(47)
    weights[f"{prefix}of_another_kind.weight"] = torch.ones(2)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Expected exactly the weights of the encoder") as caught:
        build_initial_checkpoint(broken, write_llm(tmp_path / "llm"), tmp_path / "new")
    message = str(caught.value)
    assert "missing: encoder.layers.1.mlp.fc1.bias;" in message
    assert "of another shape: post_layernorm.weight (47,) for (48,);" in message
    assert "of_another_kind.weight" in message


def test_a_language_model_without_its_head(siglip, tmp_path):
    llm = write_llm(tmp_path / "llm")
    weights = stored(llm)
    del weights["lm_head.weight"]
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of the language model .* missing: lm_head\.weight\. "):
        build_initial_checkpoint(siglip, llm, tmp_path / "new")


def test_damaged_language_models(siglip, tmp_path):
    llm = write_llm(tmp_path / "llm")
    whole = (llm / "model.safetensors").read_bytes()
    weights = stored(llm)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, llm / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights that are numbers in .*llm', got NaN in 1: model\.norm\.weight"):
        build_initial_checkpoint(siglip, llm, tmp_path / "new")
    (llm / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        build_initial_checkpoint(siglip, llm, tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 9000},
            r"weights of 9000 layers of the language model in .*llm/', as config.json says, found 2",
        ),
        ({"intermediate_size": 1_000_000}, r"shapes that config\.json asks for .*\[1000000, 32\], got \[56, 32\]"),
        ({"num_hidden_layers": 0}, r"`num_hidden_layers` of the language model to be a positive integer, got 0"),
        ({"num_key_value_heads": 3}, r"`num_key_value_heads` to divide its `num_attention_heads`"),
        ({"hidden_size": -32}, r"`hidden_size` of the language model to be a positive integer, got -32"),
    ],
)
def test_absurd_language_models_are_refused_before_they_are_built(siglip, tmp_path, changes, message):
    llm = write_llm(tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    # transformers itself refuses a number of layers that contradicts this list; a stranger's file need not have it.
    del config["layer_types"]
    (llm / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        build_initial_checkpoint(siglip, llm, tmp_path / "new")


def test_a_tokenizer_without_the_chat_format(siglip, tmp_path):
    llm = write_llm(tmp_path / "llm", tokenizer=qwen_tokenizer(("<|endoftext|>", "<|im_start|>")))
    with pytest.raises(ValueError, match=r"tokenizer with <\|im_start\|> and <\|im_end\|> .* without <\|im_end\|>: "):
        build_initial_checkpoint(siglip, llm, tmp_path / "new")


# --- the command ---


def test_the_command(siglip, llm, tmp_path, capfd):
    out = tmp_path / "new"
    assert main(["init", "--vision", str(siglip), "--llm", str(llm), "--out", str(out), "--seed", "3"]) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    for line in (
        f"from {siglip} (siglip_vision_model)",
        "  dropped: position embedding (1 tensor)",
        "  dropped: pooling head (11 tensors)",
        "projector: 2,624 parameters, freshly initialised (seed 3)",
        f"parameters from {llm}, head of its own",
        "tokenizer: added <image> = 263, <|stream_start|> = 264, <|stream_end|> = 265",
        "  embedding not resized: 300 rows hold every token",
        "generation: stops at <|im_end|> too, the end of an answer",
        f"wrote {out}: ",
    ):
        assert line in printed.out, line
    VideoLlama3VisionModel.from_pretrained(out)
    assert main(["init", "--vision-from", str(out), "--llm", str(llm), "--out", str(tmp_path / "again")]) == 0
    assert "dropped: language model and projector" in capfd.readouterr().out
    assert main(["init", "--vision", str(siglip), "--llm", str(llm), "--out", str(out)]) == 1
    assert capfd.readouterr().err.startswith("videollama3 init: Expected a new or empty folder")
    for both in (["--vision", "a", "--vision-from", "b"], []):
        with pytest.raises(SystemExit) as caught:
            main(["init", *both, "--llm", str(llm), "--out", str(tmp_path / "x")])
        assert caught.value.code == 2


@pytest.mark.slow
def test_parts_from_the_hubs_cache(siglip, llm, tmp_path):
    home, out = tmp_path / "home", tmp_path / "new"
    for repository, folder in (("org/siglip", siglip), ("org/qwen", llm)):
        as_hub_cache(folder, home, repository)
    command = ["init", "--vision", "org/siglip", "--llm", "org/qwen", "--out", str(out)]
    result = subprocess.run(
        [sys.executable, "-m", "videollama3", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "from org/siglip (siglip_vision_model)" in result.stdout
    assert_parts(out, encoder=bare(stored(siglip)), llm=llm)
