"""Model cards: one template and one facts file -> the `README.md` of a checkpoint.

A kind of checkpoint, its name, and what a training run recorded enter; the text of the card leaves, metadata first.
Files are left to `model_card_folder.py`.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData

from .model_card_memory import ModelSizes, VisionSizes, budget_rows, gigabytes
from .model_card_training import TrainingFacts

Kind = Literal["2B", "7B", "2B-Image", "7B-Image", "encoder", "own"]
Layout = Literal["plugin", "official", "native"]
RELEASES: tuple[Kind, ...] = ("2B", "7B", "2B-Image", "7B-Image", "encoder")
KINDS: tuple[Kind, ...] = (*RELEASES, "own")

_FOLDER = resources.files(__package__)
FACTS: dict[str, Any] = json.loads((_FOLDER / "model_card_facts.json").read_text(encoding="utf-8"))
_TEMPLATE = (_FOLDER / "model_card_template.md").read_text(encoding="utf-8")

_LAYOUT_WORDS = {
    "plugin": "in the layout of the package `videollama3`",
    "official": "in the authors' own layout, which the package `videollama3` reads",
    "native": "in the layout of transformers' own class (`video_llama_3`), which the package `videollama3` reads",
}
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_OWN_TAGS = ["videollama3", "multi-modal"]


def render_card(
    kind: Kind,
    *,
    name: str | None = None,
    layout: Layout = "plugin",
    sizes: ModelSizes | VisionSizes | None = None,
    max_tokens: int | None = None,
    training: TrainingFacts | None = None,
) -> str:
    """Renders a card.

    Args:
        kind: a release, or "own": trained or put together by the user.
        name: folder or Hub id that the snippets load; a release's name by default.
        layout: of the files.
        sizes: of the model; a release's by default. Without sizes the card of one's own has no memory table.
        max_tokens: visual tokens of a request; a release's by default, likewise.
        training: what a training run recorded.

    Returns:
        Metadata between `---` lines, then Markdown.

    Raises:
        ValueError: for an unknown kind, and for an own checkpoint without a name.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected a kind of card out of {', '.join(KINDS)}, got {kind!r}.")
    if kind == "own" and name is None:
        raise ValueError("Expected the name of the checkpoint (folder or Hub id) for a card of kind 'own', got none.")
    release = FACTS["kinds"].get(kind, {})
    name = name or release["name"]
    training = training or TrainingFacts()
    if kind != "own":
        sizes = sizes or release_sizes(kind)
        max_tokens = max_tokens or FACTS["limits"]["max_tokens"]
    fields = {**_fields(kind, name, layout, training), **_budgets(kind, sizes, max_tokens)}
    body = Template(_select(_TEMPLATE, _flags(kind, layout, training, fields))).substitute(fields)
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{card_metadata(kind, name=name, training=training).to_yaml()}\n---\n\n{body}\n"


def card_metadata(kind: Kind, *, name: str, training: TrainingFacts | None = None) -> Any:
    """The metadata of a card as `huggingface_hub.ModelCardData`, checked by it.

    Args:
        kind: a release, or "own".
        name: folder or Hub id.
        training: what a training run recorded.
    """
    training = training or TrainingFacts()
    release = FACTS["kinds"].get(kind) or _release_of(training.base_model) or {}
    pipeline_tag = release.get("pipeline_tag", "video-text-to-text")
    own = kind == "own"
    results = measured_results(training, pipeline_tag) if own else published_results(kind)
    base = training.base_model if own else release["source"]
    relation = "adapter" if training.adapter else "finetune"
    base_known = base is not None and is_hub_id(base)
    # A change of layout is none of the relations that the Hub knows (adapter, finetune, merge, quantized).
    relations = {"base_model_relation": relation} if own and base_known else {}
    return ModelCardData(
        library_name="peft" if training.adapter else "transformers",
        pipeline_tag=pipeline_tag,
        license=FACTS["licence"] if release else None,
        language=None if own else FACTS["language"],
        base_model=base if base_known else None,
        datasets=[dataset for dataset in training.data if is_hub_id(dataset)] or None,
        tags=_OWN_TAGS if own else release["tags"],
        model_name=name.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
        **relations,
    )


def published_results(kind: Kind) -> list[Any]:
    """The authors' scores for a release as `huggingface_hub.EvalResult`, with the paper as their source."""
    release = FACTS["kinds"][kind]
    paper = FACTS["paper"]
    return [
        EvalResult(
            task_type=release["pipeline_tag"],
            dataset_type=benchmark["name"],
            dataset_name=_benchmark_name(benchmark),
            dataset_config=benchmark.get("config"),
            metric_type=benchmark["metric"],
            metric_value=benchmark[release["size"]],
            source_name=f"the authors' paper, {paper['version']}",
            source_url=paper["url"],
        )
        for benchmark in _benchmarks(release)
    ]


def measured_results(training: TrainingFacts, pipeline_tag: str) -> list[Any]:
    """Those scores of a training run that name their data set."""
    return [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=score["dataset_id"],
            dataset_name=score.get("dataset_name", score["dataset_id"]),
            metric_type=score.get("metric", "score"),
            metric_name=name,
            metric_value=score["value"],
        )
        for name, score in training.scores.items()
        if "dataset_id" in score
    ]


def release_sizes(kind: Kind) -> ModelSizes | VisionSizes:
    """Sizes of a released checkpoint."""
    release = FACTS["kinds"][kind]
    if "size" in release:
        return ModelSizes(**FACTS["architectures"][release["size"]])
    vision = {name: size for name, size in FACTS["architectures"]["7B"].items() if name.startswith("vision_")}
    return VisionSizes(**vision)


def is_hub_id(text: str) -> bool:
    """Whether a name is one of the Hub (`owner/name`) rather than of a local file or folder."""
    return bool(_HUB_ID.fullmatch(text)) and not Path(text).exists() and Path(text).suffix not in (".json", ".jsonl")


def _flags(kind: Kind, layout: Layout, training: TrainingFacts, fields: dict[str, str]) -> set[str]:
    own = kind == "own"
    flags = {"own"} if own else {"release"}
    modality = "video" if own else FACTS["kinds"][kind]["modality"]
    flags |= {modality} if modality == "encoder" else {modality, "model"}
    flags.add("adapter" if training.adapter else "whole")
    if layout == "plugin" and not training.adapter:
        flags.add("remote")
    if layout != "official":
        flags.add("converted")
    if fields["licensed"]:
        flags.add("licensed")
    return flags | {
        flag
        for flag, field in (("budgets", "budget_table"), ("scores", "score_table"), ("measured", "measured_table"))
        if fields[field]
    }


def _fields(kind: Kind, name: str, layout: Layout, training: TrainingFacts) -> dict[str, str]:
    release = FACTS["kinds"].get(kind, {})
    paper = FACTS["paper"]
    known = bool(release or _release_of(training.base_model))
    return {
        "title": name.rsplit("/", 1)[-1],
        "name": name,
        "source": release.get("source", ""),
        "layout": layout,
        "layout_words": _LAYOUT_WORDS[layout],
        "history": release.get("history", ""),
        "own_summary": _own_summary(training),
        "training": _training_text(training),
        "base": _plain(training.base_model or "BASE"),
        "licensed": "yes" if known else "",
        "repository": paper["repository"],
        "score_table": _score_table(release) if release else "",
        "measured_table": _table(("what", "value"), [(k, s["value"]) for k, s in training.scores.items()]),
        "paper_title": paper["title"],
        "paper_url": paper["url"],
        "paper_link": f"[{paper['version']}]({paper['url']})",
        "paper_setup": paper["setup"],
    }


def _budgets(kind: Kind, sizes: ModelSizes | VisionSizes | None, max_tokens: int | None) -> dict[str, str]:
    if sizes is None or max_tokens is None:
        return {"budget_intro": "", "budget_table": ""}
    video = FACTS["kinds"].get(kind, {}).get("modality", "video") == "video"
    whole = isinstance(sizes, ModelSizes)
    count = sizes.num_parameters() if isinstance(sizes, ModelSizes) else sizes.num_vision_parameters()
    what = "encoder, projector and language model" if whole else "the encoder"
    limit = f"A request holds at most {max_tokens:,} visual tokens{', counted before pruning' if video else ''}"
    frames = f"; a video has at most {FACTS['limits']['max_frames']} frames, one per second" if video else ""
    intro = f"{count / 1e9:.2f} billion parameters ({what}), {gigabytes(2 * count)} GB in bfloat16.\n{limit}{frames}."
    header = ("what", "frames", "tokens of each", "tokens", "GB beside the weights", "GB together")
    rows = budget_rows(sizes, FACTS["examples"]["video" if video else "image"], max_tokens=max_tokens)
    return {"budget_intro": intro, "budget_table": _table(header, rows)}


def _own_summary(training: TrainingFacts) -> str:
    what = "An adapter for a VideoLLaMA3" if training.adapter else "A VideoLLaMA3"
    if training.base_model is None:
        return f"{what}; which checkpoint it started from was not recorded."
    return f"{what} trained from {_linked(training.base_model)}."


def _training_text(training: TrainingFacts) -> str:
    first = training.first_logged_loss
    known = [
        ("base", training.base_model),
        ("data", ", ".join(training.data) or None),
        ("training samples", training.num_train_samples),
        ("samples left out", training.num_skipped_samples),
        ("samples not come to", training.num_unread_samples or None),
        ("optimizer steps", training.num_updates),
        ("epochs", training.num_epochs),
        ("processes", training.num_processes),
        ("first logged loss", f"{first[1]} (step {first[0]})" if first else None),
        ("last logged loss", training.final_train_loss),
        ("mean loss of the run", training.mean_train_loss),
        *training.recipe.items(),
        *((f"version of {package}", version) for package, version in training.versions.items()),
    ]
    rows = [(name, value) for name, value in known if value is not None]
    if not rows:
        return "Nothing about the training of this checkpoint was recorded."
    return f"{_table(('what', 'value'), rows)}\n\nWhat is not listed was not recorded."


def _score_table(release: dict[str, Any]) -> str:
    rows = [
        (_benchmark_name(benchmark), benchmark["metric"], _published(benchmark, release["size"]))
        for benchmark in _benchmarks(release)
    ]
    return _table(("benchmark", "metric", "published"), rows)


def _published(benchmark: dict[str, Any], size: str) -> str:
    other = benchmark.get("other", {}).get(size)
    return f"{benchmark[size]} ({other})" if other else str(benchmark[size])


def _benchmarks(release: dict[str, Any]) -> list[dict[str, Any]]:
    benchmarks: list[dict[str, Any]] = FACTS["benchmarks"].get(release["modality"], [])
    return benchmarks


def _benchmark_name(benchmark: dict[str, Any]) -> str:
    return f"{benchmark['name']}, {benchmark['config']}" if "config" in benchmark else benchmark["name"]


def _release_of(base_model: str | None) -> dict[str, Any] | None:
    """The facts of the release of that Hub id."""
    return next((release for release in FACTS["kinds"].values() if release["source"] == base_model), None)


def _linked(base_model: str) -> str:
    if is_hub_id(base_model):
        return f"[{base_model}](https://huggingface.co/{base_model})"
    return f"`{_plain(base_model)}`"


def _table(header: tuple[str, ...], rows: list[Any]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(value: Any) -> str:
    """One cell: no line break, no bar, and of absolute paths only their last part."""
    parts = " ".join(str(value).split()).replace("|", r"\|").split(", ")
    return ", ".join(Path(part).name if Path(part).is_absolute() else part for part in parts)


def _select(template: str, flags: set[str]) -> str:
    """Keeps the lines of the template whose enclosing `<!-- if FLAG -->` blocks all hold."""
    lines, open_blocks = [], []
    for line in template.splitlines():
        opening = re.fullmatch(r"<!-- if (\w+) -->", line)
        if opening:
            open_blocks.append(opening[1])
        elif line == "<!-- end -->":
            open_blocks.pop()
        elif flags.issuperset(open_blocks):
            lines.append(line)
    return "\n".join(lines)
