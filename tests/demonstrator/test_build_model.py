"""The demonstrator before training: its size, and the few tokens that pictures of any size become."""

import numpy as np
import pytest
import torch
from demonstrator.build_model import build_model, build_processor
from demonstrator.make_tokenizer import make_tokenizer
from demonstrator.scenes import MAX_SIDE, MIN_SIDE

from videollama3 import VideoLlama3ForCausalLM, VideoLlama3Processor
from videollama3.modeling.vision_encoder_videollama3 import apply_rotary, rotary_table


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(num_scenes=600)


def test_parameters_and_bytes(tokenizer):
    model = build_model(tokenizer.get_vocab())
    count = sum(weights.numel() for weights in model.parameters())
    assert 3e6 <= count <= 8e6
    assert 2 * count <= 16 * 2**20, "bfloat16 bytes in the package"


def test_weights_follow_the_seed(tokenizer):
    one, same, other = (build_model(tokenizer.get_vocab(), seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("num_frames", [1, 6, 20, 64])
def test_pictures_of_any_size_become_a_few_dozen_tokens(tokenizer, num_frames):
    processor = build_processor(tokenizer)
    for height in (MIN_SIDE, 150, 240, MAX_SIDE, 1080):
        for width in (MIN_SIDE, 113, 200, MAX_SIDE, 1920):
            patches = processor.video_processor.get_num_of_video_patches(num_frames, height, width)
            assert 16 <= patches / 4 / num_frames <= 60
            if num_frames == 1:
                assert patches == processor.image_processor.get_number_of_image_patches(height, width)


def test_it_samples_once_a_second_and_answers_from_its_folder(tokenizer, tmp_path):
    model, processor = build_model(tokenizer.get_vocab()), build_processor(tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VideoLlama3Processor.from_pretrained(tmp_path)
    assert loaded.video_processor.fps == 1
    frames = np.random.default_rng(0).integers(0, 255, (4, 100, 160, 3), dtype=np.uint8)
    messages = [
        {
            "role": "user",
            "content": [{"type": "video", "video": frames}, {"type": "text", "text": "What shape is it?"}],
        }
    ]
    inputs = loaded(conversation=messages, add_generation_prompt=True, return_tensors="pt")
    assert inputs["video_grid_thw"].tolist() == [[4, 8, 12]]
    output = VideoLlama3ForCausalLM.from_pretrained(tmp_path).generate(**inputs, max_new_tokens=3)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_four_heads_begin_by_looking_at_their_neighbours(tokenizer):
    """Attention of the first layer over a 4 x 5 grid without content: most of it one patch to the named side."""
    attention = build_model(tokenizer.get_vocab()).model.vision_model.encoder.layers[0].self_attn
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    tables = rotary_table(places, head_dim=attention.head_dim, rope_theta=10000.0)
    query, key = (
        apply_rotary(projection.bias.view(1, -1, attention.head_dim).expand(20, -1, -1), *tables)
        for projection in (attention.q_proj, attention.k_proj)
    )
    weights = (torch.einsum("qhd,khd->hqk", query, key) * attention.scaling).softmax(dim=-1)
    middle = 1 * 5 + 2
    for head, step in enumerate((1, -1, 5, -5)):
        assert weights[head, middle].argmax() == middle + step
        assert weights[head, middle, middle + step] > 0.9
    torch.testing.assert_close(weights[4, middle], torch.full((20,), 0.05))


def test_the_patch_embedding_begins_with_slow_waves(tokenizer):
    embedding = build_model(tokenizer.get_vocab()).model.vision_model.embeddings.patch_embedding
    weight = embedding.weight.detach().flatten(1)
    products = weight @ weight.T
    # Orthogonal rows of one length.
    torch.testing.assert_close(products, products[0, 0] * torch.eye(160), atol=1e-5, rtol=0)
    noise = torch.randn(588, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(-1, 1, 14).expand(3, 14, 14).flatten()
    kept_noise, kept_ramp = ((weight @ patch).norm() / patch.norm() for patch in (noise, ramp))
    assert kept_ramp > 1.5 * kept_noise
