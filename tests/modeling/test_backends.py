"""Every attention backend that runs here gives the same encoder: on the CPU three of them, on a card all.

Segments are unequal; forward and backward, float32 and bfloat16, no segment sees another, and on a card the
layers neither wait for the device nor loop over frames.
"""

import importlib.util
import shutil
import warnings

import pytest
import torch

from videollama3 import VideoLlama3ForCausalLM, VideoLlama3VisionModel
from videollama3.modeling.torch_varlen import TORCH_VARLEN, varlen_obstacle

from .tiny import media, packed_with_bounds, prompt, text, tiny_config, tiny_vision_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Eight segments of seven lengths: 12, 24, 24, 24, 35, 6, 48 and 16 patches.
GRIDS = [[1, 3, 4], [3, 4, 6], [1, 5, 7], [1, 2, 3], [1, 6, 8], [1, 4, 4]]
MERGES = [1, 2, 1, 1, 2, 4]
HEAD_DIM = 72
# flex_attention is compiled for every shape, which takes most of the time.
FLEX = pytest.param(
    "flex_attention",
    marks=[
        pytest.mark.slow,
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, while it compiles
    ],
)
BACKENDS = ["eager", "sdpa", FLEX, TORCH_VARLEN, "flash_attention_2"]


def _skip_where_it_does_not_run(backend, dtype):
    if backend == "flex_attention" and DEVICE.type == "cpu" and shutil.which("c++") is None:
        pytest.skip("flex_attention is compiled, and there is no compiler")
    if backend == TORCH_VARLEN:
        obstacle = varlen_obstacle(DEVICE, dtype, head_dim=HEAD_DIM)
        if obstacle is not None:
            pytest.skip(f"{TORCH_VARLEN} does not run with {obstacle}")
    if backend == "flash_attention_2" and (
        DEVICE.type != "cuda" or dtype == torch.float32 or importlib.util.find_spec("flash_attn") is None
    ):
        pytest.skip("flash_attention_2 needs CUDA, half precision and the flash-attn package")


def _has_backward(backend):
    """On the CPU torch has no way back through flex_attention, so that only its results are compared."""
    return backend != "flex_attention" or DEVICE.type != "cpu"


def _encoder(backend, dtype):
    torch.manual_seed(0)
    encoder = VideoLlama3VisionModel(tiny_vision_config(hidden_size=144, num_attention_heads=2)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            # Larger than fresh weights, so that attention is far from uniform.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    encoder = encoder.to(DEVICE, dtype)
    encoder.set_attn_implementation(backend)
    return encoder


def _inputs(dtype=torch.float32):
    pixels, grid_thw, merge_sizes = media(GRIDS, MERGES)
    return pixels.to(DEVICE, dtype), grid_thw.to(DEVICE), merge_sizes.to(DEVICE)


def _run(backend, dtype):
    """Tokens, and gradients of the pixels and of the first query projection where there are, in float32 on the CPU."""
    encoder = _encoder(backend, dtype)
    pixels, grid_thw, merge_sizes = _inputs()
    pixels.requires_grad_(_has_backward(backend))
    with torch.set_grad_enabled(_has_backward(backend)):
        tokens = encoder(pixels, grid_thw, merge_sizes).last_hidden_state
    if not _has_backward(backend):
        return [tokens.float().cpu()]
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    (tokens.float() * weights).sum().backward()
    query = encoder.encoder.layers[0].self_attn.q_proj.weight
    return [tensor.detach().float().cpu() for tensor in (tokens, pixels.grad, query.grad)]


@pytest.fixture(scope="module")
def reference():
    return _run("eager", torch.float32)


# Largest difference by the largest entry. float32: measured 1e-6 on the CPU; a card with TF32 products, which torch
# leaves off, is off by 1e-3. bfloat16 keeps 8 bits over two layers: measured 0.01 on the CPU; segments that see each
# other are off by 0.2. Both hold on an H200, for every backend.
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 0.04}


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward(reference, backend, dtype):
    _skip_where_it_does_not_run(backend, dtype)
    results = _run(backend, dtype)
    assert len(results) == (3 if _has_backward(backend) else 1)
    # Without a way back the gradients are left out.
    for name, got, want in zip(("tokens", "pixels", "query"), results, reference, strict=False):
        difference = ((got - want).abs().max() / want.abs().max()).item()
        assert difference < TOLERANCES[dtype], name


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_changed_segment_moves_no_other(backend, dtype):
    _skip_where_it_does_not_run(backend, dtype)
    encoder = _encoder(backend, dtype)
    pixels, grid_thw, merge_sizes = _inputs()
    before = encoder(pixels, grid_thw, merge_sizes).last_hidden_state
    # Second frame of the second item: patches 12 + 24 to 12 + 48, tokens 12 + 6 to 12 + 12.
    pixels[36:60] += 1.0
    same = (before == encoder(pixels, grid_thw, merge_sizes).last_hidden_state).all(dim=1)
    assert same.tolist() == [not 18 <= token < 24 for token in range(len(before))]


@pytest.mark.parametrize("backend", [TORCH_VARLEN, "flash_attention_2"])
@torch.no_grad()
def test_layers_do_not_wait_for_the_device(backend):
    _skip_where_it_does_not_run(backend, torch.bfloat16)
    encoder = _encoder(backend, torch.bfloat16)
    arguments = _inputs()
    expected = encoder(*arguments).last_hidden_state
    stack = encoder.encoder.forward

    def watched(*args):
        try:
            with warnings.catch_warnings():
                # Of the mode itself, which is set all the same.
                warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
                torch.cuda.set_sync_debug_mode("error")
            return stack(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    encoder.encoder.forward = watched
    assert torch.equal(encoder(*arguments).last_hidden_state, expected)


@torch.no_grad()
def test_the_default_on_a_card_is_the_varlen_kernel():
    _skip_where_it_does_not_run(TORCH_VARLEN, torch.bfloat16)
    encoder = VideoLlama3VisionModel(tiny_vision_config(hidden_size=144, num_attention_heads=2))
    encoder = encoder.to(DEVICE, torch.bfloat16)
    assert encoder._attention(torch.zeros(1, 144, device=DEVICE, dtype=torch.bfloat16)).implementation == TORCH_VARLEN


# --- the language model: documents of one row ---


def _language_model(backend, dtype):
    torch.manual_seed(0)
    config = tiny_config()
    # Heads 16 wide: on a card flex_attention takes none below.
    config.text_config.hidden_size = 64
    model = VideoLlama3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(DEVICE, dtype)
    model.set_attn_implementation(backend)
    return model


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs CUDA")
@torch.no_grad()
def test_a_long_prompt_in_float32_holds_no_scores_of_all_pairs():
    model, ids = _language_model("sdpa", torch.float32), text(8192).unsqueeze(0).to(DEVICE)
    model(input_ids=ids[:, :64], logits_to_keep=1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(input_ids=ids, logits_to_keep=1)
    # Scores of four heads would be 1 GiB; what the layers hold is 30 MiB or so.
    assert torch.cuda.max_memory_allocated() - before < 2**28


# Five documents, all of other lengths, one of a single token.
LENGTHS = [7, 12, 5, 1, 9]


def _documents():
    return [prompt(text(length, seed))["input_ids"].to(DEVICE) for seed, length in enumerate(LENGTHS)]


def _packed_without_bounds(model, documents):
    lengths = [document.shape[1] for document in documents]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(DEVICE)
    logits = model(input_ids=torch.cat(documents, dim=1), position_ids=positions).logits
    return logits.split(lengths, dim=1)


# Largest difference by the largest entry, logits and gradients. Measured on the CPU 1e-6 and 0.01; not on a card.
DOCUMENT_TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 0.04}


@pytest.mark.parametrize("dtype", list(DOCUMENT_TOLERANCES), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bounds", [False, True], ids=["positions", "bounds"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_their_single_runs(backend, bounds, dtype):
    """Each against its run alone in float32 on eager: logits, and gradients of a weight in the first layer."""
    _skip_where_it_does_not_run(backend, dtype)
    if bounds and backend in ("eager", "sdpa", "flex_attention"):
        pytest.skip(f"{backend} takes no bounds")
    pack = packed_with_bounds if bounds else _packed_without_bounds
    reference, model, documents = (
        _language_model("eager", torch.float32),
        _language_model(backend, dtype),
        _documents(),
    )
    single = [reference(input_ids=document).logits for document in documents]
    with torch.set_grad_enabled(_has_backward(backend)):
        packed = pack(model, documents)
    pairs = list(zip(single, packed, strict=True))
    if _has_backward(backend):
        for logits in (single, packed):
            sum((part.float() ** 2).sum() for part in logits).backward()
        pairs.append(
            tuple(part.model.language_model.layers[0].self_attn.k_proj.weight.grad for part in (reference, model))
        )
    for want, got in pairs:
        difference = ((got.float() - want).abs().max() / want.abs().max()).item()
        assert difference < DOCUMENT_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", list(DOCUMENT_TOLERANCES), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_changed_document_moves_no_other(backend, dtype):
    _skip_where_it_does_not_run(backend, dtype)
    model, documents = _language_model(backend, dtype), _documents()
    before = _packed_without_bounds(model, documents)
    documents[1] = documents[1] + 1
    after = _packed_without_bounds(model, documents)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True, True]


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_repeated_frames_change_nothing(backend, dtype):
    """Frames equal to the one before are encoded once: the same tokens as encoding all of them, to rounding."""
    _skip_where_it_does_not_run(backend, dtype)
    encoder = _encoder(backend, dtype)
    frames = media([[3, 4, 6]], [2])[0].view(3, 24, -1)[[0, 0, 1, 1, 1, 2]]
    arguments = (frames.flatten(0, 1).to(DEVICE), torch.tensor([[6, 4, 6]]).to(DEVICE), torch.tensor([2]).to(DEVICE))
    once = encoder(*arguments).last_hidden_state.float()
    encoder.config.reuse_identical_frames = False
    each = encoder(*arguments).last_hidden_state.float()
    assert torch.equal(once[:6], once[6:12])
    assert ((once - each).abs().max() / each.abs().max()).item() < TOLERANCES[dtype]
