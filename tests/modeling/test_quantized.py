"""Quantised weights, through transformers' own configurations, on the CPU.

torchao: int8 weights, int8 activations as they come. bitsandbytes: 8 and 4 bit; it is part of no extra and of no test
environment here, so that its tests run only where somebody has installed it.
"""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

from tests.conftest import GOLDEN
from tests.media import numbered_picture, write_clip
from tests.snippets import fenced_blocks
from videollama3 import VideoLlama3ForCausalLM, VideoLlama3Processor
from videollama3.modeling.onednn_linear import OneDnnLinear
from videollama3.random_checkpoint import build_random

pytestmark = pytest.mark.slow

# Full names: "vision_model" alone fits nothing, and everything would be quantised without a word.
NOT_QUANTIZED = ["model.vision_model", "model.projector", "lm_head"]
# Seven linear layers in each of two layers.
QUANTIZED_LAYERS = 14


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights large enough that the answer hangs on every input."""
    folder = tmp_path_factory.mktemp("quantized")
    model, processor = build_random(seed=3, hidden_size=128, num_hidden_layers=2, max_tokens=256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3 if "language_model" in name else 5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(checkpoint, tmp_path_factory):
    """A question about a clip of which a part is pruned."""
    clip = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(clip, 75, pictures=[numbered_picture(i // 30) for i in range(75)], options={"crf": "0"})
    content = [{"type": "video", "path": str(clip)}, {"type": "text", "text": "What moves?"}]
    processor = VideoLlama3Processor.from_pretrained(checkpoint)
    inputs = processor(
        conversation=[{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt"
    )
    assert 0 < int(inputs["video_compression_mask"].sum()) < len(inputs["video_compression_mask"])
    return inputs


@pytest.fixture(scope="module")
def expected(checkpoint, inputs):
    return logits(VideoLlama3ForCausalLM.from_pretrained(checkpoint).eval(), inputs)


@torch.inference_mode()
def logits(model, inputs):
    return model(**inputs).logits.float()


def int8(kept=NOT_QUANTIZED):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)


def names_of(model, kind):
    return {name for name, weight in model.named_parameters() if type(weight.data).__name__ == kind}


@pytest.fixture(scope="module")
def model(checkpoint):
    """The language model in int8."""
    return AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=int8()).eval()


class TestInt8:
    def test_the_language_model_alone_is_quantized(self, model):
        names = names_of(model, "Int8Tensor")
        assert len(names) == QUANTIZED_LAYERS
        assert all(name.startswith("model.language_model.layers.") for name in names)
        weight = model.model.language_model.layers[0].mlp.up_proj.weight
        assert weight.qdata.dtype == torch.int8
        assert weight.qdata.shape == (256, 128)

    def test_answers_stay_close(self, model, inputs, expected):
        said = logits(model, inputs)
        # Measured 0.12 of 4.5 for random weights, 98 % of the next tokens equal; float weights are 0 apart, and
        # a row that gets the scale of another is off by more than 2.
        assert 1e-3 < float((said - expected).abs().max()) < 0.5
        assert float((said.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.9
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert tokens[0, -4] == said[0, -1].argmax()

    def test_the_snippet_of_the_page(self, checkpoint, inputs, model):
        blocks = fenced_blocks((GOLDEN.parents[1] / "docs" / "scale.md").read_text(encoding="utf-8"))
        (code,) = [code for language, code in blocks if language == "python" and "torchao" in code]
        names = {}
        exec(compile(code.replace('"DIR"', repr(str(checkpoint))), "docs/scale.md", "exec"), names)
        assert torch.equal(logits(names["model"].eval(), inputs), logits(model, inputs))

    def test_saved_and_read_again(self, model, checkpoint, inputs, tmp_path):
        model.save_pretrained(tmp_path)
        again = VideoLlama3ForCausalLM.from_pretrained(tmp_path).eval()
        assert names_of(again, "Int8Tensor") == names_of(model, "Int8Tensor")
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, checkpoint)]
        assert sizes[0] < 0.75 * sizes[1]

    def test_encoder_and_projector_on_request(self, checkpoint, inputs, expected):
        model = VideoLlama3ForCausalLM.from_pretrained(checkpoint, quantization_config=int8(["lm_head"])).eval()
        # Six linear layers in each of two layers of the encoder, two in the projector.
        assert len(names_of(model, "Int8Tensor")) == QUANTIZED_LAYERS + 2 * 6 + 2
        assert float((logits(model, inputs) - expected).abs().max()) < 1.0

    def test_the_official_layout(self):
        """Weights are renamed and quantised in one go."""
        model = VideoLlama3ForCausalLM.from_pretrained(GOLDEN / "ckpt", quantization_config=int8())
        with safe_open(GOLDEN / "ckpt" / "model.safetensors", "pt") as file:
            weight = file.get_tensor("model.layers.0.mlp.up_proj.weight").float()
        read = model.model.language_model.layers[0].mlp.up_proj.weight.dequantize().float()
        # Half a step of a row's 127.
        assert float(((read - weight).abs() / weight.abs().amax(dim=1, keepdim=True)).max()) < 0.55 / 127

    def test_weights_that_are_no_numbers_are_refused(self, checkpoint, tmp_path):
        model = VideoLlama3ForCausalLM.from_pretrained(checkpoint)
        with torch.no_grad():
            model.model.language_model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"NaN in 1: model\.language_model\.layers\.1\.mlp\.down_proj\.weight"):
            VideoLlama3ForCausalLM.from_pretrained(tmp_path, quantization_config=int8())


# Measured: 8 bit 0.11 of 4.5 off and 99 % of the next tokens equal; 4 bit 1.4 off and 75 %, for random weights.
BITS = {"8 bit": ({"load_in_8bit": True}, 0.5, 0.9), "4 bit": ({"load_in_4bit": True}, 3.0, 0.5)}


@pytest.mark.parametrize("name", BITS)
def test_bitsandbytes(name, checkpoint, inputs, expected, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    options, most, share = BITS[name]
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=NOT_QUANTIZED)
    model = VideoLlama3ForCausalLM.from_pretrained(checkpoint, quantization_config=config).eval()
    kinds = (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    assert len(names) == QUANTIZED_LAYERS
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert type(model.model.vision_model.encoder.layers[0].mlp.fc1) is OneDnnLinear
    # Before the first answer: on the CPU that repacks the weights of 4 bit, and what is saved afterwards is wrong.
    model.save_pretrained(tmp_path)
    said = logits(model, inputs)
    assert 1e-3 < float((said - expected).abs().max()) < most
    assert float((said.argmax(-1) == expected.argmax(-1)).float().mean()) > share
    again = VideoLlama3ForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), said)
