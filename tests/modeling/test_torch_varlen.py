"""torch's varlen kernel: registration, choice by default, and the call under every signature since torch 2.10.

The kernel itself runs on CUDA only; here a plain loop stands in for it, with the kernel's parameters.
"""

import copy
import itertools
import re

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2 as qwen2

import videollama3
from videollama3.modeling import torch_varlen as module
from videollama3.modeling import vision_encoder_videollama3 as encoder_module
from videollama3.modeling.torch_varlen import TORCH_VARLEN, check_varlen, torch_varlen_attention

from .tiny import image_and_video_request, media, packed_with_bounds, prompt, text, tiny_config, tiny_vision_config

HEAD_DIM = 12
BOUNDS = [0, 5, 6, 13, 15, 24]


def _loop(query, key, value, bounds, *, scale, causal):
    """Softmax of each sequence and head, in float64; key heads repeat."""
    repeat = query.shape[1] // key.shape[1]
    output = torch.empty_like(query)
    for start, end in itertools.pairwise(bounds.tolist()):
        for head in range(query.shape[1]):
            q, k, v = query[start:end, head], key[start:end, head // repeat], value[start:end, head // repeat]
            scores = q.double() @ k.double().T * scale
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
            output[start:end, head] = (scores.softmax(-1) @ v.double()).to(query.dtype)
    return output


def _kernel_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert query.shape[1] == key.shape[1]
    assert query.shape[2] % 8 == 0
    return _loop(query, key, value, cu_seq_q, scale=query.shape[2] ** -0.5, causal=is_causal)


def _kernel_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] == key.shape[1]
    assert query.shape[2] % 8 == 0
    return _loop(query, key, value, cu_seq_q, scale=scale, causal=window_size == (-1, 0))


def _kernel_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query.shape[2] % 8 == 0
    return _loop(query, key, value, cu_seq_q, scale=scale, causal=window_size == (-1, 0))


KERNELS = [_kernel_2_10, _kernel_2_11, _kernel_2_13]


@pytest.fixture
def install(monkeypatch):
    """Puts a loop in the kernel's place and lets it run on the CPU."""

    def use(kernel):
        parameters = frozenset(module.inspect.signature(kernel).parameters)
        monkeypatch.setattr(module, "_varlen_attn", kernel)
        monkeypatch.setattr(module, "_PARAMETERS", parameters)
        monkeypatch.setattr(module, "varlen_obstacle", lambda *args, **kwargs: None)
        monkeypatch.setattr(encoder_module, "varlen_obstacle", lambda *args, **kwargs: None)

    return use


@pytest.mark.parametrize("kernel", KERNELS, ids=["2.10", "2.11", "2.13"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_every_signature_gives_the_same(install, kernel, causal, key_heads):
    install(kernel)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 24, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, 1, key_heads, 24, HEAD_DIM, generator=generator)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    output, weights = torch_varlen_attention(
        nn.Module(),
        query,
        key,
        value,
        None,
        scaling=0.4,
        is_causal=causal,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=9,
        max_length_k=9,
    )
    expected = _loop(*(tensor[0].transpose(0, 1) for tensor in (query, key, value)), bounds, scale=0.4, causal=causal)
    assert weights is None
    # Measured worst case 1.2e-7 of 3.1; the scale of the padded width instead of 0.4 is off by 0.5.
    torch.testing.assert_close(output, expected.unsqueeze(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS, ids=["2.10", "2.11", "2.13"])
@torch.no_grad()
def test_packed_documents_need_no_mask(install, monkeypatch, kernel):
    """The language model with bounds: each document equals its single run on sdpa, and no mask is made."""
    install(kernel)
    torch.manual_seed(0)
    model = videollama3.VideoLlama3ForCausalLM(tiny_config()).eval()
    documents = [prompt(text(length, seed))["input_ids"] for seed, length in enumerate([7, 12, 5])]
    single = [model(input_ids=document).logits for document in documents]
    model.set_attn_implementation({"text_config": TORCH_VARLEN})
    monkeypatch.setattr(qwen2, "create_causal_mask", lambda *args, **kwargs: pytest.fail("a mask was made"))
    for got, want in zip(packed_with_bounds(model, documents), single, strict=True):
        # Measured 9e-8 of logits up to 0.43.
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_autocast_on_float32_weights_reaches_the_kernel_in_half_precision(install, monkeypatch):
    """As training with `precision: bf16` computes: rotary embedding leaves queries and keys in float32 there."""
    given = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        given.append((query.dtype, key.dtype, value.dtype))
        return _loop(query, key, value, cu_seq_q, scale=scale, causal=window_size == (-1, 0))

    install(kernel)
    asked = []
    monkeypatch.setattr(module, "check_varlen", lambda device, dtype, **kwargs: asked.append(dtype))
    torch.manual_seed(0)
    model = videollama3.VideoLlama3ForCausalLM(tiny_config())
    documents = [prompt(text(length, seed))["input_ids"] for seed, length in enumerate([7, 12, 5])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = [model(input_ids=document).logits for document in documents]
        model.set_attn_implementation({"text_config": TORCH_VARLEN})
        packed = packed_with_bounds(model, documents)
    assert set(given) == {(torch.bfloat16,) * 3}
    assert set(asked) == {torch.bfloat16}
    for got, want in zip(packed, single, strict=True):
        # Measured 2e-3 of 0.43: one step of bfloat16 there.
        torch.testing.assert_close(got, want, atol=4e-3, rtol=0)
    sum(logits.float().square().sum() for logits in packed).backward()
    assert all(weights.grad is not None for weights in model.model.language_model.layers.parameters())


def test_bounds_are_for_one_row_of_full_attention(install):
    """The kernel reads the first row only, and knows no window."""
    install(_kernel_2_13)
    model = videollama3.VideoLlama3ForCausalLM(tiny_config()).eval()
    model.set_attn_implementation({"text_config": TORCH_VARLEN})
    document = prompt(text(7, 0))["input_ids"]
    with pytest.raises(ValueError, match="Expected one row of documents for torch_varlen, got 2 rows"):
        packed_with_bounds(model, [document.expand(2, -1), document.expand(2, -1)])
    model.model.language_model.layers[0].self_attn.sliding_window = 4
    with pytest.raises(ValueError, match="got a sliding window of 4"):
        packed_with_bounds(model, [document, document])


@pytest.mark.parametrize("kernel", KERNELS, ids=["2.10", "2.11", "2.13"])
@torch.no_grad()
def test_the_encoder_gives_the_same_as_on_sdpa(install, kernel):
    pixels, grid_thw, merge_sizes = media([[1, 3, 4], [3, 4, 6], [1, 5, 7], [1, 2, 3], [1, 6, 4]], [1, 2, 1, 1, 2])
    torch.manual_seed(0)
    encoder = videollama3.VideoLlama3VisionModel(tiny_vision_config(num_attention_heads=4)).eval()
    encoder.set_attn_implementation("sdpa")
    expected = encoder(pixels, grid_thw, merge_sizes).last_hidden_state
    install(kernel)
    encoder.set_attn_implementation(TORCH_VARLEN)
    # Measured worst case 4.8e-7 of 3.5; fresh weights attend almost evenly: segments mixed up are off by 5e-3.
    torch.testing.assert_close(encoder(pixels, grid_thw, merge_sizes).last_hidden_state, expected, atol=5e-6, rtol=0)


# --- choosing it ---


def test_it_is_registered():
    assert ALL_ATTENTION_FUNCTIONS[TORCH_VARLEN] is torch_varlen_attention
    assert ALL_MASK_ATTENTION_FUNCTIONS[TORCH_VARLEN] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def _used(model, install):
    """The implementation that the encoder takes where the kernel runs."""
    encoder = model if isinstance(model, videollama3.VideoLlama3VisionModel) else model.model.vision_model
    install(_kernel_2_13)
    return encoder._attention(torch.zeros(1, 48)).implementation


def _model(**kwargs):
    return videollama3.VideoLlama3ForCausalLM._from_config(tiny_config(), **kwargs)


def test_where_nothing_is_asked_for_the_kernel_is_used(install):
    model = _model()
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert _used(model, install) == TORCH_VARLEN


def test_where_the_kernel_does_not_run_the_default_is_sdpa():
    for model in (_model().model.vision_model, videollama3.VideoLlama3VisionModel(tiny_vision_config())):
        assert model._attention(torch.zeros(1, 48)).implementation == "sdpa"


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_an_explicit_choice_is_respected(install, name):
    assert _used(_model(attn_implementation=name), install) == name


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_later_choice_is_respected(install, name):
    model = _model()
    model.set_attn_implementation(name)
    assert _used(model, install) == name
    alone = videollama3.VideoLlama3VisionModel(tiny_vision_config())
    alone.set_attn_implementation(name)
    assert _used(alone, install) == name


def test_the_default_comes_back_by_its_name_in_the_configuration(install):
    alone, whole = videollama3.VideoLlama3VisionModel(tiny_vision_config()), _model()
    for model, config in ((alone, alone.config), (whole, whole.config.vision_config)):
        before = config._attn_implementation
        model.set_attn_implementation("eager")
        assert _used(model, install) == "eager"
        model.set_attn_implementation(before if model is alone else {"vision_config": before})
        assert _used(model, install) == TORCH_VARLEN


def test_a_choice_for_the_language_model_leaves_the_encoders_default(install):
    model = _model(attn_implementation={"text_config": "eager"})
    assert model.model.language_model.config._attn_implementation == "eager"
    assert _used(model, install) == TORCH_VARLEN
    model.set_attn_implementation({"text_config": "sdpa"})
    assert _used(model, install) == TORCH_VARLEN


def test_a_choice_per_part(install):
    model = _model(attn_implementation={"vision_config": TORCH_VARLEN, "text_config": "sdpa"})
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert model.model.vision_model.config._attn_implementation == TORCH_VARLEN
    assert _used(model, install) == TORCH_VARLEN


def test_the_default_survives_copies_and_saving(install, tmp_path):
    encoder = videollama3.VideoLlama3VisionModel(tiny_vision_config())
    encoder.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    again = videollama3.VideoLlama3VisionModel(encoder.config)
    for model in (copy.deepcopy(encoder), loaded, again):
        assert _used(model, install) == TORCH_VARLEN
    assert _used(AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa"), install) == "sdpa"


# --- where it does not run ---


@torch.no_grad()
def test_asked_for_on_the_cpu_it_says_what_to_do():
    model = _model(attn_implementation=TORCH_VARLEN).eval()
    message = 'without attention dropout, got device cpu: choose "sdpa", or move and cast the model.'
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**image_and_video_request())


@pytest.mark.parametrize(
    ("device", "dtype", "options", "obstacle"),
    [
        ("cuda", torch.float32, {"head_dim": 72}, "got dtype torch.float32"),
        ("cuda", torch.bfloat16, {"head_dim": 264}, "got head width 264"),
        ("cuda", torch.bfloat16, {"head_dim": 72, "dropout": 0.1}, "got attention dropout 0.1"),
    ],
)
def test_each_obstacle_is_named(monkeypatch, device, dtype, options, obstacle):
    monkeypatch.setattr(module, "_varlen_attn", _kernel_2_13)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    with pytest.raises(ValueError, match=re.escape(obstacle)):
        check_varlen(torch.device(device), dtype, **options)
    check_varlen(torch.device("cuda"), torch.bfloat16, head_dim=72)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape("got a build of torch without flash kernels")):
        check_varlen(torch.device("cuda"), torch.bfloat16, head_dim=72)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=re.escape("got compute capability (7, 5)")):
        check_varlen(torch.device("cuda"), torch.bfloat16, head_dim=72)
    monkeypatch.setattr(module, "_varlen_attn", None)
    with pytest.raises(ValueError, match=re.escape("which has no torch.nn.attention.varlen")):
        check_varlen(torch.device("cuda"), torch.bfloat16, head_dim=72)


@torch.no_grad()
def test_the_language_model_without_bounds_runs_on_sdpa():
    """Asked for as a whole, text goes to sdpa with its masks: padding and causality hold."""
    model = _model(attn_implementation={"vision_config": "sdpa", "text_config": TORCH_VARLEN}).eval()
    request = image_and_video_request()
    answer = model.generate(**request, max_new_tokens=4, do_sample=False, pad_token_id=301)
    logits = model(**request).logits
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(**request).logits, logits)
    assert torch.equal(model.generate(**request, max_new_tokens=4, do_sample=False, pad_token_id=301), answer)


# --- the kernel itself ---


@pytest.mark.skipif(
    not torch.cuda.is_available() or module._varlen_attn is None, reason="needs CUDA and torch 2.10 or newer"
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_on_a_card_equals_a_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, 4, 24, 72, generator=generator).to("cuda", dtype).requires_grad_() for _ in range(3)]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    output, _ = torch_varlen_attention(nn.Module(), *states, None, 72**-0.5, 0.0, False, bounds, bounds, 9, 9)
    expected = _loop(*(s.detach()[0].transpose(0, 1) for s in states), bounds, scale=72**-0.5, causal=False)
    # Rounding of the output to 8 bits of values up to 3; not yet measured on a card.
    torch.testing.assert_close(output[0], expected, atol=0.03, rtol=0.02)
    output.sum().backward()
    assert all(torch.isfinite(state.grad).all() for state in states)
