"""A checkpoint from a stranger: damaged, hostile and absurd ones give one clear error each, before anything is built."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from videollama3 import VideoLlama3Config, VideoLlama3ForCausalLM, VideoLlama3Model, VideoLlama3VisionModel
from videollama3.modeling.checkpoint_checks import check_finite
from videollama3.modeling.checkpoint_files import file_inside, read_header, shorten, stored_tensors


@pytest.fixture
def weights(golden_folder):
    return load_file(golden_folder / "ckpt" / "model.safetensors")


@pytest.fixture
def folder(golden_folder, tmp_path):
    """A copy of the golden checkpoint, to be spoilt."""
    return shutil.copytree(golden_folder / "ckpt", tmp_path / "checkpoint")


def shard(folder, weights, count=3):
    """Splits the weights into files with an index; returns the index."""
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: weights[name] for name in names[i::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    write_index(folder, index)
    return index


def write_index(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_config(folder, part=None, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(changes)
    path.write_text(json.dumps(config))


def refused(folder, error, match, cls=VideoLlama3ForCausalLM, **options):
    with pytest.raises(error, match=match):
        cls.from_pretrained(folder, **options)


# --- headers ---


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_with_header(path, header, data):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def spoil(entry, value):
    def change(header):
        header["lm_head.weight"][entry] = value

    return change


def move(header):
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("dtype", "F33"), r"the dtype of 'lm_head.weight' is 'F33'"),
        (spoil("dtype", ["F32"]), r"the dtype of 'lm_head.weight' is \['F32'\]"),
        (spoil("shape", [320, 65]), r"of shape \[320, 65\] takes 83200 bytes, its place has 81920"),
        (spoil("shape", [-320, -64]), r"the shape of 'lm_head.weight' is \[-320, -64\]"),
        (spoil("shape", [320, 64.0]), r"the shape of 'lm_head.weight' is \[320, 64.0\]"),
        (spoil("shape", [2**62, 2**62]), r"takes 85070591730234615865843651857942052864 bytes, its place has 81920"),
        (spoil("data_offsets", [0]), r"the data_offsets of 'lm_head.weight' are \[0\]"),
        (spoil("data_offsets", [-81920, 0]), r"the data_offsets of 'lm_head.weight' is \[-81920, 0\]"),
        (move, r"'lm_head.weight' starts at byte \d+, the one before ends at \d+"),
        (lambda header: header.update(more="x"), r"the entry of 'more' is no object"),
        (lambda header: header.pop("lm_head.weight"), r"' starts at byte \d+, the one before ends at \d+"),
    ],
)
def test_wrong_entries_of_a_header(folder, change, message):
    path = folder / "model.safetensors"
    header, data = header_of(path)
    change(header)
    write_with_header(path, header, data)
    refused(folder, ValueError, rf"Expected an intact weight file, got '.*model.safetensors': .*{message}\. Download")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", r"no valid JSON \(Expecting property name"),
        (b"[]", "its header is a list, not an object"),
        (b'{"a": 1, "a": 2}', r"no valid JSON \(a name stands there twice\)"),
        (b"[" * 200_000, r"no valid JSON \(maximum recursion depth"),
        (b"\xff\xfe{}", r"no valid JSON \('utf-8' codec"),
    ],
)
def test_headers_that_are_none(folder, header, message):
    write_with_header(folder / "model.safetensors", header, b"")
    refused(folder, ValueError, f"Expected an intact weight file, .*{message}")


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 50) + b"{}"])
def test_a_header_longer_than_the_file(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, ValueError, rf"its header claims \d+ bytes, the file has {len(content)}")


def test_a_file_that_was_cut_off_or_has_more(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused(folder, ValueError, f"its tensors end at byte {len(whole)}, the file has {len(whole) - 5}")
    path.write_bytes(whole + b"12345")
    refused(folder, ValueError, f"its tensors end at byte {len(whole)}, the file has {len(whole) + 5}")


def test_headers_agree_with_the_library(golden_folder, weights):
    stored = read_header(str(golden_folder / "ckpt" / "model.safetensors"))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()
    }
    assert sum(tensor.num_bytes for tensor in stored.values()) == sum(tensor.nbytes for tensor in weights.values())


# --- the index ---


def test_absent_shards_are_named(folder, weights):
    shard(folder, weights, count=4)
    (folder / "model-00002-of-00004.safetensors").unlink()
    (folder / "model-00004-of-00004.safetensors").unlink()
    refused(
        folder,
        FileNotFoundError,
        "the 4 weight files that model.safetensors.index.json names in .*, 2 absent: "
        "model-00002-of-00004.safetensors, model-00004-of-00004.safetensors. Download the checkpoint again",
    )


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "..\\x.safetensors"]
)
def test_an_index_that_names_files_elsewhere(folder, weights, name):
    index = shard(folder, weights)
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", folder.parent / "outside.safetensors")
    index["weight_map"]["lm_head.weight"] = (
        name.replace("/outside", f"{folder.parent}/outside") if name[0] == "/" else name
    )
    write_index(folder, index)
    refused(
        folder, ValueError, "Expected the plain name of a file in .*: a checkpoint may name no file outside its folder"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "Expected a `weight_map` of tensors to files in .*, got NoneType"),
        ('{"weight_map": []}', "Expected a `weight_map` .*, got list"),
        ('{"weight_map": {"a": 3}}', "Expected a file name ending in '.safetensors' for 'a' in .*, got 3"),
        ('{"weight_map": {"a": "config.json"}}', "ending in '.safetensors' for 'a' in .*, got 'config.json'"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "ending in '.safetensors' .*, got 'pytorch_model.bin'"),
        ("{", "no valid JSON"),
    ],
)
def test_an_index_that_is_none(folder, weights, content, message):
    shard(folder, weights)
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, ValueError, message)


def test_an_index_that_disagrees_with_its_files(folder, weights):
    index = shard(folder, weights)
    index["weight_map"]["model.more.weight"] = "model-00001-of-00003.safetensors"
    write_index(folder, index)
    refused(
        folder,
        ValueError,
        "in the file that model.safetensors.index.json names .*, 1 are not there: model.more.weight",
    )


def test_a_tensor_in_two_files(folder, weights):
    shard(folder, weights)
    save_file(weights, folder / "model-00002-of-00003.safetensors")
    refused(
        folder, ValueError, "Expected each tensor once in .*, got '.*' in model-00002-of-00003.safetensors and another"
    )


# --- links ---


def test_links_that_leave_the_folder(folder, weights):
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to("../outside.safetensors")
    message = r"Expected '.*checkpoint/model.safetensors' to be a file of its own folder, got a link to '.*outside"
    refused(folder, ValueError, message)
    # A link inside the folder is one's own business.
    shutil.move(outside, folder / "weights.bin")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("weights.bin")
    VideoLlama3ForCausalLM.from_pretrained(folder)
    shutil.move(folder / "config.json", folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")
    refused(folder, ValueError, r"Expected '.*config.json' to be a file of its own folder, got a link to")


def test_a_snapshot_in_the_hub_cache(folder, golden_folder, tmp_path):
    repository = tmp_path / "models--some--one"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    VideoLlama3ForCausalLM.from_pretrained(snapshot)
    # Not into another repository.
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(golden_folder / "ckpt" / "model.safetensors")
    refused(snapshot, ValueError, "to be a file of its own folder, got a link to '.*golden")


def test_a_repository_by_its_id(folder, tmp_path, weights, monkeypatch):
    """Offline, as the cache of `huggingface_hub` has it; also with an index that names a file elsewhere."""
    repository = tmp_path / "cache" / "models--some--one"
    snapshot = repository / "snapshots" / ("0" * 40)
    index = shard(folder, weights)
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    VideoLlama3ForCausalLM.from_pretrained("some/one", **options)
    index["weight_map"]["lm_head.weight"] = "../../../../outside.safetensors"
    write_index(snapshot, index)
    with pytest.raises(ValueError, match=r"Expected the plain name of a file in .*outside\.safetensors"):
        VideoLlama3ForCausalLM.from_pretrained("some/one", **options)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b", "..\\a"])
def test_names_that_are_no_plain_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="Expected the plain name of a file in"):
        file_inside(str(tmp_path), name)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"Expected a file 'model.safetensors' in"):
        stored_tensors(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"Expected weights in '.*' \(one of model.safetensors, model.safe"):
        stored_tensors(str(tmp_path / "empty"))


# --- torch's files ---


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_cannot_run_code(folder, tmp_path, zipped):
    (folder / "model.safetensors").unlink()
    mark = str(tmp_path / "was here")
    torch.save(
        {"lm_head.weight": torch.zeros(2), "x": Touch(mark)},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    message = "Expected only tensors in '.*pytorch_model.bin', got something else .Python objects could run code.: not loaded"
    refused(folder, ValueError, message)
    refused(
        folder, ValueError, "Expected weights_only=True, got False: torch files would run code", weights_only=False
    )
    assert not os.path.exists(mark)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "it holds a list, not a dictionary of tensors"),
        ({"a": 3}, "'a' is a int, not a tensor"),
        (
            {"a": torch.zeros(1).expand(10**9, 10**9)},
            r"'a' of shape \[1000000000, 1000000000\] claims more than is stored",
        ),
    ],
)
def test_a_torch_file_with_something_else(folder, content, message):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, ValueError, f"Expected an intact weight file, got '.*pytorch_model.bin': {message}")


def test_a_damaged_torch_file(folder, weights):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(weights, path)
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04", pickle.dumps(3, protocol=2)[:-1], whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(folder, ValueError, r"Expected (an intact weight file, got|only tensors in) '.*pytorch_model.bin'")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_in_shards(folder, weights, model, zipped):
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        part = {name: weights[name] for name in names[i::2]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = VideoLlama3ForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


# --- weights that do not fit, or are none ---


def test_tensors_of_other_shapes_are_listed(folder, weights):
    weights["lm_head.weight"] = torch.zeros(320, 32)
    weights["model.vision_encoder.post_layernorm.bias"] = torch.zeros(63)
    save_file(weights, folder / "model.safetensors")
    refused(
        folder,
        ValueError,
        r"of the shapes that config.json asks for in .*, 2 differ: model.vision_model.post_layernorm.bias \[64\], got "
        r"\[63\], lm_head.weight \[320, 64\], got \[320, 32\]. Weights and configuration are not of one model",
    )
    VideoLlama3ForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_a_number(folder, weights, dtype):
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
    weights["model.norm.weight"][3] = float("nan")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        folder,
        ValueError,
        "Expected weights that are numbers in '.*checkpoint', got NaN in 2: "
        "model.language_model.layers.1.mlp.up_proj.weight, model.language_model.norm.weight. The checkpoint is damaged",
    )


def test_infinities_of_both_signs_are_numbers():
    module = torch.nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[float("inf"), -float("inf")]]))
    check_finite(module, "here")
    check_finite(torch.nn.Linear(2, 1, device="meta"), "here")


# --- absurd configurations ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "`num_hidden_layers` of the language model to be a positive integer, got 0"),
        ({"hidden_size": -64}, "`hidden_size` of the language model to be a positive integer, got -64"),
        ({"vocab_size": 0}, "`vocab_size` of the language model to be a positive integer, got 0"),
        ({"intermediate_size": 1.5}, "`intermediate_size` of the language model to be a positive integer, got 1.5"),
        (
            {"num_attention_heads": True},
            "`num_attention_heads` of the language model to be a positive integer, got True",
        ),
        (
            {"num_key_value_heads": "2"},
            "`num_key_value_heads` of the language model to be a positive integer, got '2'",
        ),
        (
            {"num_attention_heads": 3},
            "`hidden_size` to be a multiple of 2 \\* `num_attention_heads` .*, got 64 and 3 heads",
        ),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` to divide its `num_attention_heads`, got 3 and 4"),
        ({"hidden_size": 2**40}, "`hidden_size` of the language model to be at most 1048576, got 1099511627776"),
        (
            {"num_hidden_layers": 10**9},
            "`num_hidden_layers` of the language model to be at most 10000, got 1000000000",
        ),
        (
            {"num_hidden_layers": 9999},
            "Expected weights of 9999 layers of the language model in .*, as config.json says, found 2",
        ),
        ({"vocab_size": 2**24}, r"embed_tokens.weight \[16777216, 64\], got \[320, 64\]"),
        ({"hidden_size": 2**20}, r"asks for in .*, \d+ differ: .*\[1048576, .*and \d+ more"),
    ],
)
def test_absurd_language_models(folder, changes, message):
    change_config(folder, **changes)
    refused(folder, ValueError, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "`num_hidden_layers` of the vision encoder to be a positive integer, got 0"),
        (
            {"num_attention_heads": 3},
            "`hidden_size` to be a multiple of 4 \\* `num_attention_heads` .*, got 64 and 3 heads",
        ),
        ({"patch_size": -14}, "`patch_size` of the vision encoder to be a positive integer, got -14"),
        ({"num_channels": 0}, "`num_channels` of the vision encoder to be a positive integer, got 0"),
        ({"patch_size": 2**20}, "`patch_size` of the vision encoder to be at most 1024, got 1048576"),
        ({"num_hidden_layers": 5000}, "weights of 5000 layers of the vision encoder in .*, found 2"),
        ({"intermediate_size": 2**20}, r"fc1.weight \[1048576, 64\], got \[144, 64\]"),
    ],
)
@pytest.mark.parametrize("cls", [VideoLlama3ForCausalLM, VideoLlama3VisionModel])
def test_absurd_vision_encoders(folder, changes, message, cls):
    change_config(folder, "vision_encoder_config", **changes)
    refused(folder, ValueError, message, cls=cls)


def test_an_absurd_configuration_without_a_checkpoint():
    with pytest.raises(ValueError, match="`num_hidden_layers` of the language model to be a positive integer, got -1"):
        VideoLlama3Config(text_config={"num_hidden_layers": -1})


def test_mostly_absent_weights(folder, weights):
    """The language model's biggest parts are gone: nothing justifies making them up."""
    kept = {name: tensor for name, tensor in weights.items() if "proj.weight" not in name and "embed" not in name}
    kept = {name: tensor for name, tensor in kept.items() if not name.startswith(("lm_head", "model.mm"))}
    kept = {name: tensor for name, tensor in kept.items() if "mlp.fc" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        folder,
        ValueError,
        r"Expected the weights of a VideoLlama3ForCausalLM in .*: config.json asks for \d+ values, the files justify",
    )


@pytest.mark.slow
def test_what_is_asked_for_is_not_allocated(folder):
    """Sizes of a 70-GB embedding, in a process that may have 8 GB of addresses more than it has."""
    change_config(folder, hidden_size=2**12, vocab_size=2**22)
    code = (
        "import resource, sys, videollama3\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 8 * 2**30,) * 2)\n"
        "try:\n"
        "    videollama3.VideoLlama3ForCausalLM.from_pretrained(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, timeout=120
    )
    message, kilobytes = result.stdout.splitlines()
    assert "model.language_model.embed_tokens.weight [4194304, 4096], got [320, 64]" in message
    # Measured 0.47 GB, all of it imports.
    assert int(kilobytes) < 2_000_000


def test_the_base_model_and_own_names_pass(folder, model, tmp_path):
    for cls in (VideoLlama3Model, VideoLlama3VisionModel):
        cls.from_pretrained(folder).save_pretrained(tmp_path / cls.__name__)
        cls.from_pretrained(tmp_path / cls.__name__)


def test_a_list_for_a_message():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten([str(i) for i in range(25)], most=3) == "0, 1, 2 and 22 more"
