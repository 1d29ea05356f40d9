"""Does int8 change what a checkpoint answers?

    python benchmarks/quantized.py CHECKPOINT --pictures 50 --clips 100

Held-out pictures and clips are made here, as for `demonstrator/evaluate.py`, and every question on them is answered
greedily three times: by the checkpoint as it is, with the linear layers of the language model in int8 (weights per
row, activations per token as they come; torchao through transformers' `TorchAoConfig`), and with those of the encoder
and the projector as well. The head stays as it is. An answer is unchanged when it is the same word for word.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.FOLDER.parent))

# Names from the top of the model: transformers matches them from the start, a bare "vision_model" fits nothing.
KEPT = {
    "language model in int8": ["model.vision_model", "model.projector", "lm_head"],
    "all but the head in int8": ["lm_head"],
}
AIM_PERCENT = 95.0
TOY_NEW_TOKENS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder of a model that answers the demonstrator's questions")
    parser.add_argument("--pictures", type=int, default=50, help="how many (default 50)")
    parser.add_argument("--clips", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--toy", action="store_true", help="random weights, two files: shows that the script runs")
    parser.add_argument("--output", type=Path, default=None, help="folder of the JSON (default benchmarks/results)")
    options = parser.parse_args()
    if (options.checkpoint is None) != options.toy:
        parser.error("expected a checkpoint, or --toy for random weights")
    environment = common.environment()
    with tempfile.TemporaryDirectory() as folder:
        record = compare(options, Path(folder))
    show(record["sides"])
    common.write_json(
        "quantized_toy" if options.toy else "quantized",
        {
            "question": (__doc__ or "").splitlines()[0],
            "command": common.command_line(__file__),
            **environment,
            **record,
        },
        folder=options.output,
    )


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Answers of all sides to the same questions."""
    from transformers import AutoProcessor

    from demonstrator import evaluate

    checkpoint = options.checkpoint
    if options.toy:
        checkpoint = write_toy(folder / "checkpoint")
        evaluate.MAX_NEW_TOKENS = TOY_NEW_TOKENS
    media = folder / "media"
    media.mkdir()
    pictures, clips = (1, 1) if options.toy else (options.pictures, options.clips)
    questions = evaluate.make_questions(media, num_pictures=pictures, num_clips=clips)
    processor = AutoProcessor.from_pretrained(checkpoint)
    sides: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    for side in ("as it is", *KEPT):
        model = load(checkpoint, KEPT.get(side))
        before = common.cpu_seconds()
        texts[side] = [said.text for said in evaluate.answer(model, processor, questions)]
        right = [evaluate.is_right(question.turn, text) for question, text in zip(questions, texts[side], strict=True)]
        same = [text == first for text, first in zip(texts[side], texts["as it is"], strict=True)]
        sides[side] = {
            "unchanged_percent": percent(same),
            "right_percent": percent(right),
            "weights_mib": sum(stored_bytes(weight) for weight in model.parameters()) / 2**20,
            "cpu_seconds": common.cpu_seconds() - before,
        }
        del model
        gc.collect()
    quantized = sides["language model in int8"]
    return {
        "setting": {"pictures": pictures, "clips": clips, "questions": len(questions), "aim_percent": AIM_PERCENT},
        "reached": quantized["unchanged_percent"] >= AIM_PERCENT,
        "sides": sides,
        "changed": [
            {"question": question.turn.question, "as it is": first, "int8": text}
            for question, first, text in zip(
                questions, texts["as it is"], texts["language model in int8"], strict=True
            )
            if first != text
        ],
    }


def load(checkpoint: str | Path, kept: list[str] | None) -> Any:
    """The checkpoint, in int8 but for the modules that are kept; as it is for None."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import AutoModelForImageTextToText, TorchAoConfig

    import videollama3  # noqa: F401 - registers the classes

    quantization = {}
    if kept is not None:
        scheme = Int8DynamicActivationInt8WeightConfig()
        quantization["quantization_config"] = TorchAoConfig(scheme, modules_to_not_convert=kept)
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto", **quantization).eval()


def write_toy(folder: Path) -> Path:
    """Random weights; their answers mean nothing."""
    from videollama3.random_checkpoint import build_random

    model, processor = build_random(seed=0, max_tokens=128)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def stored_bytes(tensor: Any) -> int:
    """Bytes of a tensor; of a quantised one, of its integers and scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(stored_bytes(getattr(tensor, name)) for name in names)
    return int(tensor.numel() * tensor.element_size())


def percent(values: Sequence[bool]) -> float:
    """Share of what holds."""
    return round(100 * sum(values) / len(values), 1)


def show(sides: dict[str, dict[str, Any]]) -> None:
    """Prints the table."""
    common.print_table(
        ["weights", "answers unchanged", "right", "MiB", "CPU s"],
        [
            [
                side,
                f"{figures['unchanged_percent']:.1f} %",
                f"{figures['right_percent']:.1f} %",
                f"{figures['weights_mib']:.1f}",
                f"{figures['cpu_seconds']:.1f}",
            ]
            for side, figures in sides.items()
        ],
    )


if __name__ == "__main__":
    main()
