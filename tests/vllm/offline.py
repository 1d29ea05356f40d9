"""Answers of vLLM's offline engine, in a process of its own.

python -m tests.vllm.offline CHECKPOINT MEDIA OUTPUT.json SETTINGS_JSON
"""

import json
import sys
from pathlib import Path

import av
import numpy as np

from tests.vllm import cases


def record(output):
    (completion,) = output.outputs
    return {
        "prompt": list(output.prompt_token_ids),
        "answer": list(completion.token_ids),
        "logprobs": [
            step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ],
        "cached": output.num_cached_tokens,
    }


def sources(paths):
    """The clip of "at most 2 frames" in the forms that `multi_modal_data` takes."""
    path = paths["moving"]
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    picked = np.stack([frames[24], frames[99]])
    return {
        "path": (str(path), {"max_frames": 2}),
        "bytes": (path.read_bytes(), {"max_frames": 2}),
        "frames": (picked, {"timestamps": [0.0, 3.0]}),
    }


def main(checkpoint, media, output, settings):
    from vllm import LLM, SamplingParams

    paths = {path.stem: path for path in Path(media).iterdir()}
    llm = LLM(checkpoint, dtype="float32", max_model_len=2048, max_num_seqs=16, **json.loads(settings))
    greedy = SamplingParams(temperature=0, max_tokens=cases.MAX_NEW_TOKENS, logprobs=1)

    def chat(case, **options):
        variables = {"add_system_prompt": options.pop("add_system_prompt")} if "add_system_prompt" in options else {}
        (answered,) = llm.chat(
            cases.for_vllm(case, paths),
            greedy,
            use_tqdm=False,
            mm_processor_kwargs=options,
            chat_template_kwargs=variables,
        )
        return record(answered)

    answers = {"alone": {case: chat(case) for case in cases.CASES}}
    answers["extra"] = {name: chat(case, **options) for name, (case, options) in cases.EXTRA.items()}
    answers["again"] = {case: chat(case) for case in cases.CASES}
    batch = llm.chat([cases.for_vllm(case, paths) for case in cases.CASES], greedy, use_tqdm=False)
    answers["batched"] = {case: record(answered) for case, answered in zip(cases.CASES, batch, strict=True)}
    prompt = "<|im_start|>user\n<|video_pad|>\nWhat happens?<|im_end|>\n<|im_start|>assistant\n"
    answers["sources"] = {}
    for name, video in sources(paths).items():
        request = {"prompt": prompt, "multi_modal_data": {"video": video}}
        answers["sources"][name] = record(llm.generate(request, greedy, use_tqdm=False)[0])
    answers["errors"] = {}
    for name, part in {
        "broken file": {"video": b"no video at all"},
        "unknown option": {"video": (paths["moving"].read_bytes(), {"frames": 3})},
        "two videos, one placeholder": {"video": [str(paths["moving"])] * 2},
    }.items():
        try:
            llm.generate({"prompt": prompt, "multi_modal_data": part}, greedy, use_tqdm=False)
        except ValueError as error:
            answers["errors"][name] = str(error)
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
