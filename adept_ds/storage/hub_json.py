"""The JSON files of a hub folder, written so that older readers do not misread them.

`transformers` 5 keeps the settings of rotary positions in `rope_parameters`; versions 4 look for `rope_theta`, do not
find it, and compute with their default: other text, and no warning. It names the tokenizer's class `TokenizersBackend`,
which they refuse. So both forms stand in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adept_ds.files import read_json, write_json

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
_OF_THIS_LOAD = ("backend", "is_local", "local_files_only", "tokenizer_file", "auto_map", "name_or_path")
_OF_POST_PROCESSOR = ("add_bos_token", "add_eos_token")
_OLD_NAMES = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
"""Fields of `rope_parameters` to their names in `transformers` 4."""
_OWN_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""The same for model types that have names of their own."""
_BOTH_KINDS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
"""Where each kind of layer has positions of its own: the kind to Gemma 3's name in `transformers` 4."""


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json with the names that `transformers` 4 looks for beside those of 5."""
    values = {name: readable_config(value) if isinstance(value, dict) else value for name, value in config.items()}
    if "dtype" in values:
        values.setdefault("torch_dtype", values["dtype"])
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return values
    if rope.keys() & _BOTH_KINDS.keys():
        for kind, name in _BOTH_KINDS.items():
            values.setdefault(name, rope.get(kind, {}).get("rope_theta"))
        rope = rope.get("full_attention", {})
    for name, old in (_OLD_NAMES | _OWN_NAMES.get(str(values.get("model_type")), {})).items():
        if name in rope:
            values.setdefault(old, rope[name])
    scaling = {name: value for name, value in rope.items() if name not in _OLD_NAMES}
    if scaling.get("rope_type", "default") != "default":
        values.setdefault("rope_scaling", scaling)
    return values


def readable_tokenizer_config(config: Mapping[str, Any], input_names: list[str]) -> dict[str, Any]:
    """Return the values of a tokenizer_config.json for a folder whose tokenizer.json says all of the tokenizer.

    What a class would build anew from settings, such as a start token, is in that file already.
    """
    left_out = {*_OF_THIS_LOAD, *_OF_POST_PROCESSOR}
    values = {name: value for name, value in config.items() if name not in left_out}
    return {
        **values,
        "tokenizer_class": TOKENIZER_CLASS,
        "model_input_names": values.get("model_input_names", input_names),
    }


def make_readable(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the values of a JSON file that `transformers` has written."""
    write_json(path, change(read_json(path)))
