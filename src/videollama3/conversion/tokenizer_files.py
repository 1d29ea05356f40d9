"""Tokenizer files and chat templates of a checkpoint folder, for each layout.

The source's files enter; the same tokens and the same prompts leave, in the files that the target's readers look
for. Image and video settings are left to `processor_files.py`.

The tokenizer's own files are copied byte for byte, since every layout reads them; only `tokenizer_config.json` is
rewritten, without what belongs to the source's layout.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from jinja2 import TemplateError

from ..modeling.checkpoint_files import file_inside
from ..processing.prompt_tokens import CHAT_TEMPLATE, SYSTEM_PROMPT
from .weights import write_json

_COPIED = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
# Fields about the folder or the code that wrote it, not about the tokens.
_DROPPED = ("auto_map", "chat_template", "processor_class", "is_local", "local_files_only", "name_or_path")
# What only transformers 5 writes and the authors' version does not know.
_NEW_FIELDS = ("backend", "extra_special_tokens")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# The released format for the authors' processor, which hands in `image_token`, and for a video its number of
# frames and their timestamps.
OFFICIAL_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and add_system_prompt and message['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- set tag = 'stream' if message['role'] == 'stream' else 'im' -%}"
    "{{- '<|' ~ tag ~ '_start|>' ~ message['role'] ~ '\\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] ~ '<|' ~ tag ~ '_end|>\\n' -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part is string -%}{{- part -}}"
    "{%- elif part['type'] == 'text' or 'text' in part -%}{{- part['text'] -}}"
    "{%- elif part['type'] == 'image' or 'image' in part -%}"
    "{%- if 'timestamp' in part -%}{{- 'Time ' ~ part['timestamp'] | round(1) ~ 's: ' -}}{%- endif -%}"
    "{{- image_token ~ '\\n' -}}"
    "{%- elif part['type'] == 'video' or 'video' in part -%}"
    "{%- for frame in range(part['num_frames']) -%}"
    "{%- if 'timestamps' in part -%}{{- 'Time ' ~ part['timestamps'][frame] | round(1) ~ 's:' -}}{%- endif -%}"
    "{{- image_token ~ ('\\n' if loop.last else ',') -}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|' ~ tag ~ '_end|>' ~ ('' if tag == 'stream' else '\\n') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# Every branch of the released format.
_PROBE = (
    {"role": "user", "content": [{"type": "image", "image": "0"}, {"type": "text", "text": "a"}]},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": [{"type": "video", "video": "1"}, {"type": "text", "text": "c"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "d"}]},
    {"role": "stream", "content": [{"type": "image", "image": "2", "timestamp": 1.25}]},
    {"role": "user", "content": "e"},
)


def has_tokenizer(folder: str) -> bool:
    """Whether a folder has a tokenizer."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in ("tokenizer.json", "vocab.json"))


def is_released_format(processor: Any) -> bool:
    """Whether a processor's chat template renders conversations as the released models' does."""
    if not isinstance(processor.chat_template, str):
        return False
    if processor.chat_template in (CHAT_TEMPLATE, OFFICIAL_CHAT_TEMPLATE):
        return True
    for options in ({}, {"add_system_prompt": True, "add_generation_prompt": True}):
        expected = processor.apply_chat_template(list(_PROBE), chat_template=CHAT_TEMPLATE, **options)
        try:
            rendered = processor.apply_chat_template(list(_PROBE), **options)
        except (ValueError, TemplateError):
            # One that leaves out media or roles, or does not know them.
            return False
        if rendered != expected:
            return False
    return True


def write_tokenizer(folder: str, target: str, tokenizer: Any, *, official: bool, chat_template: Any) -> None:
    """Writes tokenizer files and chat template.

    Args:
        folder: the source.
        target: the folder to write to.
        tokenizer: the source's tokenizer, loaded.
        official: whether to complete the set of files that the authors' version of transformers reads.
        chat_template: Jinja source (or several by name).
    """
    for name in _COPIED:
        if os.path.lexists(os.path.join(folder, name)):
            shutil.copyfile(file_inside(folder, name), os.path.join(target, name))
    config = _stored_config(folder)
    if official:
        config = _official_config(config, tokenizer)
        _complete_official_files(target, tokenizer)
        config["chat_template"] = chat_template
        write_json(os.path.join(target, "chat_template.json"), {"chat_template": chat_template})
    elif isinstance(chat_template, str):
        with open(os.path.join(target, "chat_template.jinja"), "w", encoding="utf-8") as file:
            file.write(chat_template)
    else:
        config["chat_template"] = chat_template
    write_json(os.path.join(target, "tokenizer_config.json"), config)


def _stored_config(folder: str) -> dict[str, Any]:
    if not os.path.lexists(os.path.join(folder, "tokenizer_config.json")):
        return {}
    with open(file_inside(folder, "tokenizer_config.json"), encoding="utf-8") as file:
        config: dict[str, Any] = json.load(file)
    return {name: value for name, value in config.items() if name not in _DROPPED}


def _official_config(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    official = {name: value for name, value in config.items() if name not in _NEW_FIELDS}
    special = config.get("extra_special_tokens")
    if isinstance(special, list):
        official.setdefault("additional_special_tokens", special)
    official.setdefault("added_tokens_decoder", _added_tokens_decoder(tokenizer))
    if official.get("tokenizer_class") in (None, "TokenizersBackend"):
        official["tokenizer_class"] = "PreTrainedTokenizerFast"
    return official


def _added_tokens_decoder(tokenizer: Any) -> dict[str, dict[str, Any]]:
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        str(token_id): {field: getattr(token, field) for field in fields}
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
    }


def _complete_official_files(target: str, tokenizer: Any) -> None:
    """Writes the files of older tokenizers that the source lacks, from the loaded tokenizer."""

    def lacks(name: str) -> bool:
        return not os.path.exists(os.path.join(target, name))

    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    if lacks("added_tokens.json"):
        write_json(os.path.join(target, "added_tokens.json"), dict(sorted(added.items())))
    if lacks("special_tokens_map.json"):
        named = {name: str(token) for name in _NAMED_TOKENS if (token := getattr(tokenizer, name, None)) is not None}
        others = [token for token in tokenizer.all_special_tokens if token not in named.values()]
        write_json(os.path.join(target, "special_tokens_map.json"), {"additional_special_tokens": others, **named})
    if lacks("tokenizer.json"):
        tokenizer.backend_tokenizer.save(os.path.join(target, "tokenizer.json"))
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") == "BPE":
        if lacks("vocab.json"):
            write_json(os.path.join(target, "vocab.json"), model["vocab"])
        if lacks("merges.txt"):
            lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            with open(os.path.join(target, "merges.txt"), "w", encoding="utf-8") as file:
                file.write("\n".join(["#version: 0.2", *lines]) + "\n")
