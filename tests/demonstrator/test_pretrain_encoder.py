"""What the encoder learns before there are words: labels of visual tokens, and that it learns them."""

import dataclasses

import numpy as np
import pytest
import torch
from demonstrator.build_model import build_model, build_processor
from demonstrator.make_data import CAPTIONS, PICTURES, Counts, make_data
from demonstrator.make_tokenizer import make_tokenizer
from demonstrator.pretrain_encoder import (
    LabelledPictures,
    bin_shares,
    collate,
    picture_scene,
    token_labels,
    token_places,
    train,
)
from demonstrator.scenes import COLORS, KINDS, MAX_SHAPES, random_picture


def _scene(*shapes, width=112, height=84):
    scene = random_picture(np.random.default_rng(0), count=1)
    made = tuple(
        dataclasses.replace(
            scene.shapes[0],
            kind=kind,
            color=color,
            size=size,
            motion=dataclasses.replace(scene.shapes[0].motion, x=x, y=y),
        )
        for kind, color, size, x, y in shapes
    )
    return dataclasses.replace(scene, width=width, height=height, shapes=made)


def test_a_token_tells_what_covers_it():
    # Three rows and four columns of 28 x 28; the circle fills the first, the cross lies across two.
    scene = _scene(("circle", "red", 28, 14, 14), ("cross", "blue", 20, 84, 70))
    labels, centers = (values.unflatten(0, (3, 4)) for values in token_labels(scene, 3, 4))
    kinds, colors = labels[..., 0], labels[..., 1]
    circle, cross = 1 + KINDS.index("circle"), 1 + KINDS.index("cross")
    assert kinds.tolist() == [[circle, 0, 0, 0], [0, 0, 0, 0], [0, 0, cross, cross]]
    assert colors[0, 0] == 1 + COLORS.index("red")
    assert colors[2, 2] == colors[2, 3] == 1 + COLORS.index("blue")
    torch.testing.assert_close(centers[0, 0], torch.tensor([14 / 112, 14 / 84]))
    torch.testing.assert_close(centers[2, 2:], torch.tensor([[84 / 112, 70 / 84]] * 2))
    assert not centers[0, 1].any()
    # The cross's centre lies on the line between its two tokens, which belongs to the second.
    assert labels[..., 2].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert (labels[..., 3] == 1).all(), "two shapes"


def test_one_token_of_each_shape_holds_its_centre():
    for number in range(50):
        scene = random_picture(np.random.default_rng([4, number]))
        labels, _ = token_labels(scene, 4, 5)
        assert labels[:, 2].sum() <= len(scene.shapes)
        assert labels[0, 3] == len(scene.shapes) - 1 < MAX_SHAPES
        if len(scene.shapes) == 1:
            assert labels[:, 2].sum() == 1


def test_places_are_centres():
    torch.testing.assert_close(token_places(1, 2), torch.tensor([[0.25, 0.5], [0.75, 0.5]]))


def test_bins_count_by_their_distance_from_the_centre():
    shares = bin_shares(torch.tensor([[0.125, 0.5], [1.0, 0.0]]))
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(2, 2))
    # The middle of the third of twenty bins; the line between the tenth and the eleventh; beyond the last and first.
    assert shares[0, 0].argmax() == 2
    assert shares[0, 0, 1] == pytest.approx(shares[0, 0, 3].item())
    assert shares[0, 1, 9] == pytest.approx(shares[0, 1, 10].item())
    assert shares[0, 1].max() == shares[0, 1, 9]
    assert shares[1].argmax(dim=-1).tolist() == [19, 0]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, counts=Counts(captions=12, pictures=12, clips=0, streams=0, review=0, heldout=0), processes=1)
    return folder


def test_labels_are_of_the_picture_in_the_file(drawn):
    """The colour in the middle of each shape, read from the file, is the shape's own."""
    from PIL import Image

    for part, folder in ((CAPTIONS, "captions"), (PICTURES, "pictures")):
        for number in range(12):
            scene = picture_scene(part, number, seed=0)
            pixels = np.asarray(Image.open(drawn / folder / f"{number:06d}.png")).astype(int)
            assert pixels.shape[:2] == (scene.height, scene.width)
            for shape in scene.shapes:
                if shape.outline == 0:
                    middle = pixels[int(shape.motion.y), int(shape.motion.x)]
                    assert np.abs(middle - shape.rgb).max() <= 25, (number, shape)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_encoder_learns(drawn, precision):
    tokenizer = make_tokenizer(num_scenes=300)
    encoder = build_model(tokenizer.get_vocab(), vision_hidden_size=64, vision_layers=1, vision_heads=4)
    encoder = encoder.model.vision_model
    files = [(part, number) for part in (CAPTIONS, PICTURES) for number in range(12)]
    pictures = LabelledPictures(drawn, build_processor(tokenizer), files, seed=0)
    batch = collate([pictures[i] for i in range(len(pictures))])
    before = encoder.embeddings.patch_embedding.weight.detach().clone()
    scores = []
    torch.manual_seed(0)  # of the heads
    train(encoder, [batch] * 60, num_updates=60, merge=2, rate=2e-3, precision=precision, report=scores.append)
    assert not torch.equal(before, encoder.embeddings.patch_embedding.weight)
    assert scores[-1].loss < 0.6 * scores[0].loss
    assert scores[-1].colors > 0.6
