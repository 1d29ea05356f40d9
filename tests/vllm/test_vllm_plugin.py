"""What the plugin does before a model is loaded; needs no vLLM."""

import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

from videollama3.processing.prompt_tokens import CHAT_TEMPLATE
from videollama3.serving import vllm_plugin


@pytest.fixture
def installed(monkeypatch):
    def install(version):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))

    monkeypatch.delenv(vllm_plugin.ANY_VERSION_VARIABLE, raising=False)
    return install


def test_the_entry_point_is_the_function():
    (point,) = entry_points(group="vllm.general_plugins", name="videollama3")
    assert point.load() is vllm_plugin.register


def test_importing_the_package_imports_no_vllm():
    code = "import sys, videollama3, videollama3.serving.vllm_plugin; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.3", "0.32.1rc1+cpu"])
def test_the_tested_series_passes(installed, version):
    installed(version)
    vllm_plugin.check_version()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.32.0", "0.3.2"])
def test_another_version_is_refused(installed, monkeypatch, version):
    installed(version)
    with pytest.raises(ImportError, match=rf"Expected vLLM 0\.32\.\*.*got {version}.*VIDEOLLAMA3_ANY_VLLM=1"):
        vllm_plugin.check_version()
    monkeypatch.setenv(vllm_plugin.ANY_VERSION_VARIABLE, "1")
    vllm_plugin.check_version()


def test_the_authors_chat_template_gives_way_to_ours(golden_folder, processor):
    loaded = vllm_plugin.Videollama3Qwen2Processor.from_pretrained(golden_folder / "ckpt")
    assert "num_frames" in processor.chat_template
    assert loaded.chat_template == CHAT_TEMPLATE


def test_a_template_that_shows_videos_is_kept(processor, monkeypatch):
    own = "{{ messages[0]['content'] }}{{ video_token }}"
    monkeypatch.setattr(processor, "chat_template", own)
    monkeypatch.setattr(vllm_plugin.VideoLlama3Processor, "from_pretrained", lambda *_: processor)
    assert vllm_plugin.Videollama3Qwen2Processor.from_pretrained("anything").chat_template == own
