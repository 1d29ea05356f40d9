"""What `videollama3 serve` says before it serves."""

import socket
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import GOLDEN
from videollama3.cli import main

needs_server = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "openai", "uvicorn")), reason="needs videollama3[serve]"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FOLDER_OR_REPO"),
        (["DIR", "--port", "70000"], "expected a port from 0 to 65535, got 70000"),
        (["DIR", "--media-root", "no-such-folder"], "expected a folder, got 'no-such-folder'"),
        (["DIR", "--dtype", "int3"], "invalid choice"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    # How Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(GOLDEN / "ckpt")]) == 1
    assert capsys.readouterr().err == (
        "videollama3 serve: Expected the packages of a server, uvicorn missing: pip install 'videollama3[serve]'.\n"
    )


@needs_server
def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(GOLDEN / "ckpt"), "--port", str(port)]) == 1
    assert f"Expected a free address of this machine to listen at, got 127.0.0.1:{port}" in capsys.readouterr().err


@needs_server
def test_an_address_that_is_not_of_this_machine(capsys):
    assert main(["serve", str(GOLDEN / "ckpt"), "--host", "192.0.2.1"]) == 1
    assert "Expected a free address of this machine to listen at, got 192.0.2.1:8000" in capsys.readouterr().err


@needs_server
def test_a_checkpoint_that_is_not_there(capsys, tmp_path):
    assert main(["serve", str(tmp_path / "absent"), "--port", "0"]) == 1
    assert "absent" in capsys.readouterr().err


@needs_server
@pytest.mark.parametrize(
    ("build_server", "difference"),
    [
        (lambda model_manager, chat_handler: None, "does not take completion_handler, generation_state, response_"),
        (
            lambda model_manager, chat_handler, completion_handler, response_handler, generation_state, scheduler: (
                None
            ),
            "asks for scheduler",
        ),
    ],
)
def test_a_stand_in_for_a_server_of_another_shape_is_refused(build_server, difference, monkeypatch, model, processor):
    from videollama3.serving import transformers_server
    from videollama3.serving.media_access import MediaAccess

    monkeypatch.setattr(transformers_server, "build_server", build_server)
    with pytest.raises(RuntimeError, match=rf"Expected the server of transformers 5.16.1 to 5.23.*{difference}"):
        transformers_server.build_application(model, processor, name="a", access=MediaAccess())
