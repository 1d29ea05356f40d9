"""vLLM against transformers: the same prompts, the same greedy tokens. Run by `make test-vllm`."""

from importlib.util import find_spec

import pytest

from tests.vllm import cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]

# Measured worst case over all cases and settings: 3e-6 (float32). Features in the wrong place, of another clip or
# of another frame move the first logprob of these weights by more than 0.01.
TOLERANCE = 1e-4


def check(answer, wanted, name):
    assert answer["prompt"] == wanted["prompt"], name
    assert answer["answer"] == wanted["answer"], name
    assert answer["logprobs"] == pytest.approx(wanted["logprobs"], abs=TOLERANCE), name


def check_all(answers, expected):
    for group in ("alone", "again", "batched", "extra"):
        assert answers[group]
        for name, answer in answers[group].items():
            check(answer, expected[name], f"{group}: {name}")
    for name, answer in answers["sources"].items():
        check(answer, expected["at most 2 frames"], name)


def test_the_cases_say_something(expected):
    """Else equal answers would mean nothing."""
    assert expected["unpruned"]["prompt"] == expected["unpruned, another clip"]["prompt"]
    difference = expected["unpruned"]["logprobs"][0] - expected["unpruned, another clip"]["logprobs"][0]
    assert abs(difference) > 0.01
    kept, total = expected["pruned to almost nothing"]["kept"]
    assert total / 6 <= kept <= total / 4
    kept, total = expected["pruned little"]["kept"]
    assert 0.8 * total < kept < total
    assert set(expected) == {*cases.CASES, *cases.EXTRA}


def test_with_all_caches(ask_offline, expected):
    answers = ask_offline(enforce_eager=True)
    check_all(answers, expected)
    # The second time from the cache; of another clip with the same prompt nothing.
    assert answers["again"]["mixed"]["cached"] >= 256
    assert answers["extra"]["unpruned, another clip"]["cached"] == 0
    assert "Expected video 0 as a whole video file" in answers["errors"]["broken file"]
    assert "got frames" in answers["errors"]["unknown option"]
    assert "got 1 placeholder(s) and 2 video(s)" in answers["errors"]["two videos, one placeholder"]


def test_chunked_prefill_without_caches(ask_offline, expected):
    answers = ask_offline(
        enforce_eager=True, max_num_batched_tokens=64, enable_prefix_caching=False, mm_processor_cache_gb=0
    )
    check_all(answers, expected)
    assert not any(answer["cached"] for answer in answers["again"].values())


def test_tensor_parallel(ask_offline, expected):
    check_all(ask_offline(enforce_eager=True, tensor_parallel_size=2), expected)


def test_the_official_layout(checkpoint, media, ask_offline, expected, tmp_path):
    """The same weights as the authors name them, with their configuration and chat template."""
    from videollama3.conversion.convert import convert_checkpoint

    folder = tmp_path / "official"
    convert_checkpoint(checkpoint, folder, to="official")
    check_all(ask_offline(folder, enforce_eager=True), expected)
