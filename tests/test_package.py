"""The package as it is built: metadata, and a clean environment that has only its core dependencies."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.media import write_clip

ROOT = Path(__file__).parent.parent
CORE = {"transformers", "torch", "safetensors", "huggingface_hub", "tokenizers", "av", "pillow", "numpy"}


def test_core_dependencies_are_the_core_only():
    names = {
        re.split(r"[\s<>=!~;\[]", requirement)[0].replace("-", "_")
        for requirement in requires("videollama3")
        if "extra ==" not in requirement
    }
    assert names == CORE


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="transformers imports torchvision where it is")
def test_nothing_optional_is_imported():
    code = "import sys, videollama3, videollama3.cli; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torchvision", "decord", "cv2", "flash_attn", "torchcodec", "imageio"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_and_sdist_work_in_a_clean_environment(tmp_path):
    def run(*command, **options):
        result = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, **options)
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    run(sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert "videollama3/py.typed" in names
    assert {"videollama3/recipes/stage4.yaml", "videollama3/recipes/accelerate/fsdp2.yaml"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    with tarfile.open(sdist) as archive:
        for needed in ("/src/videollama3/cli.py", "/examples/make_clip.py", "/recipes/stage4.yaml"):
            assert any(name.endswith(needed) for name in archive.getnames()), needed
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", str(environment))
    pip = [str(environment / "bin" / "pip"), "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    run(*pip, str(wheel))
    clip = write_clip(tmp_path / "clip.mp4", 50, 25)
    answer = run(str(environment / "bin" / "videollama3"), "ask", clip, "What?", "--max-new-tokens", "3", cwd=tmp_path)
    assert answer
    run(*pip, "--force-reinstall", "--no-deps", str(sdist))
    assert "visual tokens kept" in run(str(environment / "bin" / "videollama3"), "inspect", clip, cwd=tmp_path)
