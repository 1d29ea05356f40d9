"""Answers of transformers, in a process of its own: vLLM changes the model classes of the process that it runs in.

python -m tests.vllm.reference CHECKPOINT MEDIA OUTPUT.json
"""

import json
import sys
from pathlib import Path

import torch

import videollama3
from tests.vllm import cases


def answer(model, processor, conversation, **options):
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
    )
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=cases.MAX_NEW_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    scores = [step[0].log_softmax(dim=-1) for step in output.scores]
    mask = inputs.get("video_compression_mask")
    return {
        "prompt": inputs["input_ids"][0].tolist(),
        "answer": tokens,
        "logprobs": [float(row[token]) for row, token in zip(scores, tokens, strict=True)],
        "kept": None if mask is None else [int(mask.sum()), mask.numel()],
    }


def main(checkpoint, media, output):
    model = videollama3.VideoLlama3ForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()
    processor = videollama3.VideoLlama3Processor.from_pretrained(checkpoint)
    paths = {path.stem: path for path in Path(media).iterdir()}
    answers = {case: answer(model, processor, cases.for_transformers(case, paths)) for case in cases.CASES}
    for name, (case, options) in cases.EXTRA.items():
        answers[name] = answer(model, processor, cases.for_transformers(case, paths), **options)
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
