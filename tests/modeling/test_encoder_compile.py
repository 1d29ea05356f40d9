"""The stack of encoder layers compiles as one graph, and one graph serves every length."""

import pytest
import torch

from videollama3 import VideoLlama3VisionModel

from .tiny import media, tiny_vision_config


def _tokens(encoder, grid, merge, seed):
    return encoder(*media([grid], [merge], seed)).last_hidden_state


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_one_graph_for_every_length(implementation, backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    encoder = VideoLlama3VisionModel(tiny_vision_config()).eval()
    encoder.set_attn_implementation(implementation)
    # Unequal frames and sizes; none of them 1, which torch takes for a constant.
    requests = [([3, 4, 6], 2), ([5, 6, 8], 2), ([7, 4, 10], 1), ([2, 8, 4], 2), ([4, 10, 12], 1)]
    expected = [_tokens(encoder, grid, merge, seed) for seed, (grid, merge) in enumerate(requests)]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    encoder.encoder.compile(backend=counting, fullgraph=True, dynamic=True)
    for seed, (grid, merge) in enumerate(requests):
        # Measured worst case 0 of 3.9; frames mixed up are off by 1 and more.
        torch.testing.assert_close(_tokens(encoder, grid, merge, seed), expected[seed], atol=5e-5, rtol=0)
    # The ahead-of-time backend specialises once more on a size's divisibility, then serves every length, too.
    assert len(graphs) <= (1 if backend == "eager" else 2)


@torch.no_grad()
def test_packed_kernels_compile_to_one_graph_for_every_batch(monkeypatch):
    """On the kernels of packed sequences (CUDA), batches of different numbers of sizes share the graph, too."""
    torch.compiler.reset()
    torch.manual_seed(0)
    encoder = VideoLlama3VisionModel(tiny_vision_config()).eval()

    def kernel(module, query, key, value, attention_mask, **kwargs):
        # Not attention: a stand-in without a loop over segments that reads the bounds.
        shift = kwargs["cu_seq_lens_q"].sum() + kwargs["max_length_q"]
        return (value + 0.001 * shift.to(value.dtype)).transpose(1, 2), None

    monkeypatch.setattr(encoder, "_attention", lambda hidden: type(attention)("flash_attention_2", kernel))
    attention = VideoLlama3VisionModel._attention(encoder, torch.zeros(1, 48))
    batches = [
        ([[3, 4, 6], [1, 6, 4]], [2, 2]),
        ([[2, 4, 6], [1, 3, 5], [1, 6, 8]], [2, 1, 1]),
        ([[5, 8, 4]], [2]),
        ([[1, 3, 4], [1, 5, 4], [4, 6, 6], [1, 7, 3]], [1, 1, 2, 1]),
    ]
    expected = [encoder(*media(*batch)).last_hidden_state for batch in batches]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    encoder.encoder.compile(backend=counting, fullgraph=True, dynamic=True)
    for batch, tokens in zip(batches, expected, strict=True):
        torch.testing.assert_close(encoder(*media(*batch)).last_hidden_state, tokens, atol=5e-5, rtol=0)
    assert len(graphs) == 1
