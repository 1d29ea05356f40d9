"""The encoder alone, with its image processor: what users of VL3-SigLIP-NaViT save, load and call."""

import ast
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.conftest import GOLDEN
from tests.media import numbered_picture
from videollama3 import VideoLlama3ImageProcessor, VideoLlama3VisionConfig, VideoLlama3VisionModel

from .test_remote_code import room_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The encoder and the image processor out of a whole model in the authors' layout."""
    folder = tmp_path_factory.mktemp("encoder")
    VideoLlama3VisionModel.from_pretrained(GOLDEN / "ckpt").save_pretrained(folder)
    VideoLlama3ImageProcessor.from_pretrained(GOLDEN / "ckpt").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(numbered_picture(9, 84, 140))


def test_files_named_are_files_written(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_videollama3.VideoLlama3VisionConfig",
        "AutoModel": "vision_encoder_videollama3.VideoLlama3VisionModel",
    }
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    assert preprocessor["auto_map"] == {"AutoImageProcessor": "image_processing_videollama3.VideoLlama3ImageProcessor"}
    source = {path.name: path for path in room_files()}
    written = {path.name for path in folder.glob("*.py")}
    named = {f"{target.split('.')[0]}.py" for part in (config, preprocessor) for target in part["auto_map"].values()}
    while named:
        name = named.pop()
        assert (folder / name).read_bytes() == source[name].read_bytes(), name
        written.discard(name)
        named |= {
            f"{node.module}.py"
            for node in ast.walk(ast.parse((folder / name).read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 1 and f"{node.module}.py" in written
        }
    assert written == set(), "written, and named by no file"


def test_the_configuration_keeps_the_code_it_was_saved_with(folder):
    """Without it, `trust_remote_code` takes the class inside transformers, which has the same name."""
    config = VideoLlama3VisionConfig.from_pretrained(folder)
    assert config.auto_map["AutoModel"] == "vision_encoder_videollama3.VideoLlama3VisionModel"
    # The authors' names stand for code that is not here.
    assert not hasattr(VideoLlama3VisionConfig.from_pretrained(GOLDEN / "ckpt"), "auto_map")


def test_every_sibling_that_is_imported_is_written(folder):
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert (folder / f"{node.module}.py").is_file(), (path.name, node.module)


def test_the_folder_holds_the_encoder_and_nothing_else(folder, model):
    weights = load_file(folder / "model.safetensors")
    expected = model.model.vision_model.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=str)
def test_the_auto_classes_use_the_installed_package(folder, trust):
    assert type(AutoConfig.from_pretrained(folder, **trust)) is VideoLlama3VisionConfig
    assert type(AutoModel.from_pretrained(folder, **trust)) is VideoLlama3VisionModel
    assert type(AutoImageProcessor.from_pretrained(folder, **trust)) is VideoLlama3ImageProcessor


def test_the_image_processor_of_an_encoder_whose_files_do_not_name_one(folder, tmp_path):
    for layout, model_type in (("own", "videollama3_vision"), ("official", "videollama3_vision_encoder")):
        other = tmp_path / layout
        other.mkdir()
        (other / "config.json").write_text(json.dumps({"model_type": model_type}))
        stored = json.loads((folder / "preprocessor_config.json").read_text())
        kept = {name: value for name, value in stored.items() if name not in ("auto_map", "image_processor_type")}
        (other / "preprocessor_config.json").write_text(json.dumps({**kept, "max_tokens": 77}))
        processor = AutoImageProcessor.from_pretrained(other)
        assert type(processor) is VideoLlama3ImageProcessor
        assert processor.max_tokens == 77


# --- the call ---


def test_the_image_processors_output_goes_in_as_it_is(folder, picture):
    encoder = VideoLlama3VisionModel.from_pretrained(folder).eval()
    processor = VideoLlama3ImageProcessor.from_pretrained(folder)
    inputs = processor(images=[picture, np.asarray(picture)[:56]], merge_size=1)
    with torch.no_grad():
        features = encoder(**inputs).last_hidden_state
        by_name = encoder(
            pixel_values=inputs["pixel_values"],
            grid_thw=inputs["image_grid_thw"],
            merge_sizes=inputs["image_merge_sizes"],
        ).last_hidden_state
        by_position = encoder(*inputs.values()).last_hidden_state
    assert features.shape == (int(inputs["image_grid_thw"].prod(dim=1).sum()), encoder.config.hidden_size)
    assert torch.equal(features, by_name)
    assert torch.equal(features, by_position)


def test_what_is_missing_is_named(folder, picture):
    encoder = VideoLlama3VisionModel.from_pretrained(folder).eval()
    inputs = VideoLlama3ImageProcessor.from_pretrained(folder)(images=picture)
    pixels, grids, merges = inputs.values()
    # The call that the authors' encoder takes.
    message = (
        "Expected grid_thw (or image_grid_thw, as the image processor calls it) beside pixel_values, got grid_sizes"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        encoder(pixel_values=pixels, grid_sizes=grids, merge_sizes=merges)
    with pytest.raises(TypeError, match=r"Expected merge_sizes \(or image_merge_sizes.*got nothing else"):
        encoder(pixel_values=pixels, grid_thw=grids)
    with pytest.raises(TypeError, match="Expected one of grid_thw and image_grid_thw, got both"):
        encoder(pixels, grids, merges, image_grid_thw=grids)
