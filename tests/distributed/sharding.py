"""One process of models that transformers itself spreads over processes; started by `launch.py`.

Reads a JSON of jobs, answers or trains in each, and process 0 saves what happened on every process.
"""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import DistributedConfig

from tests.media import numbered_picture, write_clip
from videollama3 import VideoLlama3ForCausalLM, VideoLlama3Processor
from videollama3.modeling import supervised_loss, vision_encoder_videollama3
from videollama3.random_checkpoint import build_random


def write_checkpoint(folder, *, tied):
    """Weights large enough that the answer hangs on every input."""
    model, processor = build_random(seed=3, hidden_size=128, num_hidden_layers=2, max_tokens=256)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3 if "language_model" in name else 5)
            if name.endswith("bias"):
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_clips(folder):
    """Two clips that differ in length; of the first, the left half stands still in part."""
    still = [numbered_picture(i) for i in range(75)]
    for i, picture in enumerate(still):
        picture[:, :104] = numbered_picture(i // 30)[:, :104]
    write_clip(folder / "0.mp4", len(still), pictures=still, options={"crf": "0"}, pix_fmt="yuv444p")
    write_clip(folder / "1.mp4", 125)


def request(processor, folder, number):
    """The question about a clip, as the model takes it."""
    content = [{"type": "video", "path": f"{folder}/{number}.mp4"}, {"type": "text", "text": "What moves?"}]
    return processor(
        conversation=[{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt"
    )


def parameter_sizes(model):
    """name -> values in all, values here; only of DTensors."""
    return {
        name: (parameter.numel(), parameter.to_local().numel())
        for name, parameter in model.named_parameters()
        if type(parameter.data).__name__ == "DTensor"
    }


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def supervised(inputs, count=20):
    labels = inputs["input_ids"].clone()
    labels[:, :-count] = -100
    return labels


def answer(model, processor, folder):
    """Logits and greedy tokens of a pruned clip, and one gradient per kind of layer."""
    inputs = request(processor, folder, 0)
    with torch.inference_mode():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    model.train()
    loss = model(**inputs, labels=supervised(inputs)).loss
    loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters() if "0.self" in name}
    keep = inputs["video_compression_mask"]
    return {
        "kept": [int(keep.sum()), len(keep)],
        "logits": logits,
        "tokens": tokens[0, inputs["input_ids"].shape[1] :].tolist(),
        "loss": loss.item(),
        "gradients": gradients,
    }


def train(model, processor, folder, *, rank, size):
    """Three updates on two clips: one on each of two processes, or both on one; then both evaluated in chunks."""
    # Five chunks of the loss for one clip and three for the other: fetching the head unequally often, one would wait.
    supervised_loss.POSITIONS_PER_CHUNK = 4
    numbers = (0, 1) if size == 1 else (rank,)
    mine = [(request(processor, folder, number), 20 - 11 * number) for number in numbers]
    # Not AdamW, which makes whole steps of gradients that are rounding; small steps, as weights this large enlarge it.
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-5)
    model.train()
    losses = []
    for _ in range(3):
        each = []
        for inputs, count in mine:
            loss = model(**inputs, labels=supervised(inputs, count)).loss
            (loss / len(mine)).backward()
            each.append(loss.item())
        if not losses:
            gradients = {name: whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(each)
    model.eval()
    # So small that the clips, of other lengths, fill other numbers of chunks.
    vision_encoder_videollama3.MAX_ACTIVATION_BYTES_PER_CHUNK = 2**20
    with torch.no_grad():
        evaluated = [model(**inputs, labels=supervised(inputs, count)).loss.item() for inputs, count in mine]
    weights = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return {"losses": losses, "evaluated": evaluated, "weights": weights, "gradients": gradients}


def run(job, *, rank=0, size=1):
    """Loads a checkpoint as the job says, and does it."""
    options = {"distributed_config": DistributedConfig(**job["config"])} if size > 1 else {}
    model = VideoLlama3ForCausalLM.from_pretrained(job["checkpoint"], dtype="float32", **options).eval()
    processor = VideoLlama3Processor.from_pretrained(job["checkpoint"])
    result = {"sharded": parameter_sizes(model), "all": sum(p.numel() for p in model.parameters())}
    if job["do"] == "train":
        return {**result, **train(model, processor, job["clips"], rank=rank, size=size)}
    result.update(answer(model, processor, job["clips"]))
    if "save" in job:
        model.save_pretrained(job["save"])
    return result


def main(path):
    settings = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {name: _from_all(run(job, rank=rank, size=size), size) for name, job in settings["jobs"].items()}
    if rank == 0:
        torch.save(results, settings["result"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # As in `worker.py`: gloo's threads were once seen to abort a process that had finished.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _from_all(value, size):
    values = [None] * size
    torch.distributed.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    main(sys.argv[1])
