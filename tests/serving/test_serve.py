"""`videollama3 serve` in a process of its own, asked by OpenAI's client, against the answers of `videollama3 ask`."""

import contextlib
import io
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.serving.servers import (
    MAX_NEW_TOKENS,
    data_url,
    running_server,
    web_server,
    write_checkpoint,
    write_media,
)
from videollama3.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("fastapi", "openai", "uvicorn")), reason="needs videollama3[serve]"
    ),
]

QUESTION = "What happens?"
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "checkpoint")


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """The media root, with a link that leads out of it."""
    folder = write_media(tmp_path_factory.mktemp("serve") / "media")
    secret = folder.parent / "secret"
    secret.mkdir()
    (secret / "clip.mp4").write_bytes((folder / "clip.mp4").read_bytes())
    (folder / "leads-out.mp4").symlink_to(secret / "clip.mp4")
    (folder / "leads-in.mp4").symlink_to(folder / "clip.mp4")
    return folder


@pytest.fixture(scope="module")
def server(checkpoint, media, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    with running_server(log, checkpoint, "--model-name", "tiny", "--media-root", media) as server:
        yield server
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def asked(checkpoint, media):
    """What `videollama3 ask` says, by file and options."""
    answers = {}

    def ask(name, *options):
        if (name, options) not in answers:
            out = io.StringIO()
            arguments = ["ask", str(media / name), QUESTION, "--model", str(checkpoint)]
            with contextlib.redirect_stdout(out):
                assert main([*arguments, "--max-new-tokens", str(MAX_NEW_TOKENS), *options, "--debug"]) == 0
            answers[name, options] = out.getvalue().removesuffix("\n")
        return answers[name, options]

    return ask


def about(url, **options):
    """A question about the picture or video at a URL."""
    kind = "image" if url.startswith("data:image") or url.endswith(".png") else "video"
    medium = {"type": f"{kind}_url", f"{kind}_url": {"url": url, **options}}
    return [{"role": "user", "content": [medium, {"type": "text", "text": QUESTION}]}]


def complete(client, messages, *, max_tokens=MAX_NEW_TOKENS, model="tiny", **options):
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=max_tokens, **options
    )


def answer(client, messages, **options):
    return complete(client, messages, **options).choices[0].message.content


def test_an_image_and_a_video_get_the_answers_of_ask(client, media, asked):
    assert [model.id for model in client.models.list()] == ["tiny"]
    for name in ("picture.png", "clip.mp4"):
        completion = complete(client, about(data_url(media / name)))
        assert completion.choices[0].message.content == asked(name)
        assert completion.choices[0].finish_reason == "length"
        assert completion.model == "tiny"
    assert len({asked("picture.png"), asked("clip.mp4"), asked("long.mp4")}) == 3


def test_media_by_http_and_below_the_media_root(client, media, asked):
    with web_server(media) as (address, _):
        for name in ("picture.png", "clip.mp4"):
            assert answer(client, about(f"{address}/{name}")) == asked(name)
    for url in ("clip.mp4", "./clip.mp4", str(media / "clip.mp4"), f"file://{media}/clip.mp4", "leads-in.mp4"):
        assert answer(client, about(url)) == asked("clip.mp4")


def test_streaming_two_at_once(client, media, asked):
    def streamed(name):
        parts = [
            part.choices[0].delta.content or ""
            for part in complete(client, about(data_url(media / name)), stream=True)
        ]
        return sum(map(bool, parts)), "".join(parts)

    names = ["picture.png", "clip.mp4"]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(streamed, names)) == [(MAX_NEW_TOKENS, asked(name)) for name in names]
        whole = pool.map(lambda name: answer(client, about(data_url(media / name))), names)
        assert list(whole) == [asked(name) for name in names]


def test_frames_are_sampled_by_our_rule_unless_the_client_chooses(client, asked):
    # Forty frames: transformers' server asks every processor for 32.
    assert answer(client, about("long.mp4")) == asked("long.mp4") != asked("long.mp4", "--max-frames", "32")
    few = asked("long.mp4", "--max-frames", "5")
    assert answer(client, about("long.mp4", max_frames=5)) == few
    assert answer(client, about("long.mp4"), extra_body={"chat_template_kwargs": {"max_frames": 5}}) == few
    assert few != asked("long.mp4")
    trimmed = asked("clip.mp4", "--fps", "2", "--start", "1", "--end", "3")
    assert answer(client, about("clip.mp4", fps=2, start_time=1, end_time=3)) == trimmed
    assert trimmed != asked("clip.mp4")


def test_an_answer_does_not_wait_for_the_media_of_another_request(client, media, asked):
    with web_server(media) as (address, release), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(answer, client, about(f"{address}/slow/clip.mp4"))
        time.sleep(0.5)
        assert answer(client, about("picture.png")) == asked("picture.png")
        assert not waiting.done()
        release.set()
        assert waiting.result(60) == asked("clip.mp4")


def test_the_responses_route_reads_the_same_messages(client, media, asked):
    content = [
        {"type": "input_image", "image_url": data_url(media / "picture.png")},
        {"type": "input_text", "text": QUESTION},
    ]
    response = client.responses.create(
        model="tiny",
        input=[{"role": "user", "content": content}],
        temperature=0,
        max_output_tokens=MAX_NEW_TOKENS,
        stream=False,
    )
    assert response.output_text == asked("picture.png")


def test_stop_strings(client, asked):
    whole = asked("picture.png")
    assert answer(client, about("picture.png"), stop=[whole[1:3]]) == whole[:3]


def test_the_snippet_of_the_docs(server, media, monkeypatch, capsys):
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("serving*.md")))
    section = pages.split("## The server of transformers", 1)[1]
    code = section.split("```python\n", 1)[1].split("```", 1)[0]
    monkeypatch.chdir(media)
    with web_server(media) as (address, _):
        for there, here in (
            ("http://127.0.0.1:8000/v1", server.url),
            ("http://127.0.0.1:9000", address),
            ('model="videollama3"', 'model="tiny"'),
            ("max_tokens=128", "max_tokens=4"),
        ):
            assert there in code
            code = code.replace(there, here)
        names = {}
        exec(compile(code, "snippet", "exec"), names)
        names["client"].close()
    assert len(capsys.readouterr().out) == 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("../secret/clip.mp4", r"\(video\) below the media root of this server, got '../secret/clip.mp4'"),
        ("leads-out.mp4", "below the media root of this server"),
        ("/etc/passwd", "below the media root of this server"),
        ("file:///etc/passwd", "below the media root of this server"),
        ("file:///%65tc/passwd", "below the media root of this server"),
        ("file://elsewhere/clip.mp4", "on the server itself"),
        ("clip\0.mp4", "zero byte"),
        ("absent.mp4", "there is no such file"),
        (".", "there is no such file"),
        ("ftp://127.0.0.1/clip.mp4", "as a data:, http: or https: URL"),
        ("concat:clip.mp4", "as a data:, http: or https: URL"),
        ("data:video/mp4;base64,AAAA", "as a whole video file"),
        ("http://127.0.0.1:9/clip.mp4", "at a URL that answers"),
    ],
)
def test_media_that_may_not_or_cannot_be_read(client, url, message):
    import openai

    with pytest.raises(openai.BadRequestError, match=message):
        answer(client, about(url))


def test_requests_that_the_model_does_not_know(client, media):
    import openai

    text = [{"role": "user", "content": "Hello"}]
    tool = {"type": "function", "function": {"name": "look"}}
    for arguments, message in (
        ({"extra_body": {"chat_template_kwargs": {"num_frames": 8}}}, "got num_frames"),
        ({"extra_body": {"chat_template_kwargs": 0}}, "as an object"),
        ({"tools": [tool]}, "without tools"),
        ({"model": "other"}, "pinned to 'tiny'"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            answer(client, text, **arguments)
    with pytest.raises(openai.BadRequestError, match="as a non-empty list"):
        answer(client, [])
    with pytest.raises(openai.BadRequestError, match="fps as a positive finite number"):
        answer(client, about("clip.mp4", fps=-1))
    with pytest.raises(openai.NotFoundError, match="served under /v1/chat/completions"):
        client.audio.transcriptions.create(model="tiny", file=b"sound")


def test_ctrl_c_ends_it_while_it_generates(client, server):
    import openai

    with ThreadPoolExecutor(1) as pool:
        # For a minute and more: the checkpoint never ends an answer.
        waiting = pool.submit(answer, client, about("picture.png"), max_tokens=20000)
        time.sleep(1)
        status, seconds = server.end(signal.SIGINT)
        with pytest.raises(openai.InternalServerError, match="The server ends"):
            waiting.result(60)
    assert status == 0
    assert seconds < 60


def test_no_files_without_a_media_root(checkpoint, media, asked, tmp_path):
    """And SIGTERM in the middle of a streamed answer."""
    import openai

    log = tmp_path / "log.txt"
    with running_server(log, checkpoint, "--no-system-prompt") as server, server.client() as client:
        name = str(checkpoint)
        for url in (str(media / "clip.mp4"), f"file://{media}/clip.mp4", "clip.mp4", "~/clip.mp4"):
            with pytest.raises(openai.BadRequestError, match="this server reads no files for its clients"):
                answer(client, about(url), model=name)
        bare = asked("clip.mp4", "--no-system-prompt")
        assert answer(client, about(data_url(media / "clip.mp4")), model=name) == bare != asked("clip.mp4")
        stream = iter(complete(client, about(data_url(media / "clip.mp4")), model=name, max_tokens=20000, stream=True))
        assert next(stream).choices
        status, seconds = server.end(signal.SIGTERM)
        with pytest.raises(Exception, match=r"(?i)incomplete|closed|peer|connection"):
            list(stream)
    assert status == 0
    assert seconds < 60
    assert "Traceback" not in log.read_text()
