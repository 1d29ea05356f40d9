"""Samples without files: a tiny model, a map-style dataset of random documents, and the arguments of a short run."""

import torch
from transformers import TrainingArguments

from tests.modeling.tiny import PATCH_WIDTH
from videollama3 import VideoLlama3ForCausalLM
from videollama3.random_checkpoint import build_random

TEXT, IMAGE, VIDEO, MIXED = "text", "image", "video", "mixed"


class Samples(torch.utils.data.Dataset):
    """Random documents, the same for a number whenever it is read; answers are one repeated token, so learnable."""

    def __init__(self, processor, kinds, *, seed=0, lengths=None):
        self.kinds, self.seed, self.lengths = list(kinds), seed, lengths
        self.image, self.video = processor.image_token_id, processor.video_token_id

    def __len__(self):
        return len(self.kinds)

    def name(self, index):
        return f"synthetic row {index}"

    def fingerprint(self):
        return f"{self.kinds} {self.seed} {self.lengths}"

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        kind = self.kinds[index]
        if kind is None:
            return None
        parts, media = [torch.randint(0, 200, (3 + index % 4,), generator=generator)], {}
        if kind in (IMAGE, MIXED):
            media.update(_image(generator))
            parts.append(torch.full((6,), self.image))
        if kind in (VIDEO, MIXED):
            media.update(_video(generator))
            parts.append(torch.full((int(media["video_compression_mask"].sum()),), self.video))
        num_answers = self.lengths[index] if self.lengths is not None else 4 + (3 * index) % 7
        answer = torch.full((num_answers,), 65 + index % 5)
        ids = torch.cat([*parts, answer])
        labels = ids.clone()
        labels[: len(ids) - num_answers] = -100
        return {"input_ids": ids, "labels": labels, **media}


def _pixels(count, generator):
    return torch.randint(0, 256, (count, PATCH_WIDTH), generator=generator, dtype=torch.uint8)


def _image(generator):
    return {
        "pixel_values": _pixels(6, generator),
        "image_grid_thw": torch.tensor([[1, 2, 3]]),
        "image_merge_sizes": torch.tensor([1]),
    }


def _video(generator):
    keep = torch.rand(8, generator=generator) < 0.6
    keep[0] = keep[4] = True
    return {
        "pixel_values_videos": _pixels(32, generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "video_merge_sizes": torch.tensor([2]),
        "video_compression_mask": keep,
    }


def tiny_model(seed=0):
    """float32 on the CPU, in training mode; attention far from uniform."""
    model, processor = build_random(seed=seed, hidden_size=32, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    assert isinstance(model, VideoLlama3ForCausalLM)
    return model.train(), processor


def arguments(folder, **changes):
    """A short run on the CPU that logs every step and writes nothing but what it is told to."""
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "seed": 3,
    }
    return TrainingArguments(**{**options, **changes})


def losses(trainer):
    """Training losses as logged, in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
