"""Makes the small copies in `cases/` from a full set of golden numbers.

Run as `python tests/golden/make_small_copies.py FULL_SET_FOLDER`, where the folder has `asis/` and `imgfix/`.
Feature and logit matrices keep at most 12 evenly spread rows; token ids and masks are kept whole.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROWS = 12


def main(source: Path) -> None:
    target = Path(__file__).parent / "cases"
    target.mkdir(exist_ok=True)
    fixed = {path.stem for path in (source / "imgfix").glob("*.json")}
    for path in sorted([*(source / "asis").glob("*.json"), *(source / "imgfix").glob("*.json")]):
        # Pictures are read with swapped sides in `asis`; `imgfix` is what the training code does.
        if path.parent.name == "asis" and path.stem in fixed:
            continue
        case = json.loads(path.read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
        small = {}
        for name in ("vision_encoder_out", "mm_features", "logits"):
            if name not in tensors:
                continue
            values = tensors[name]
            rows = tensors.get(f"{name}_rows", torch.arange(len(values)))
            pick = torch.linspace(0, len(values) - 1, min(ROWS, len(values))).long()
            small[name] = values[pick].clone()
            small[f"{name}_rows"] = rows[pick].clone()
        ids = tensors.get("input_ids_compressed", tensors["input_ids"])
        small["input_ids"] = ids.to(torch.int16)
        small["generated_greedy8"] = tensors["generated_greedy8"]
        if "compression_mask" in tensors:
            small["compression_mask"] = tensors["compression_mask"]
        save_file(small, target / f"{path.stem}.safetensors")
        for video in case.get("videos", []):
            video.pop("ambiguous_identical_frames", None)
        (target / f"{path.stem}.json").write_text(json.dumps(case, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
