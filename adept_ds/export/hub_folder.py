"""Everything of a hub folder but its weights: the base's own files, with what an export changes in them.

They are copied and edited as they are. Written anew by `transformers`, a config has the form of that version alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from adept_ds.backbone.hub import CONFIG_NAME, TOKENIZER_CONFIG_NAME
from adept_ds.backbone.load import DTYPES
from adept_ds.config.run import ModelConfig
from adept_ds.files import atomic_write, read_json, usual_mode, write_json
from adept_ds.storage.hub_json import readable_config, readable_tokenizer_config

TOKENIZER_NAME = "tokenizer.json"
TEMPLATE_NAME = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
OF_MODEL = (
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
OF_TOKENIZER = ("special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model")
"""Files that are taken over as they are, where the model's folder or the tokenizer's has them."""


@dataclass(frozen=True)
class Base:
    """Where the files of a backbone and its tokenizer are."""

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase

    def file(self, name: str) -> Path | None:
        """A file of the model, fetched from the hub if need be; None if it has none of this name."""
        return _file(self.config.name_or_path, name, self.config.revision)

    def tokenizer_file(self, name: str) -> Path | None:
        """As `file`, of the tokenizer."""
        if self.config.tokenizer is None:
            return self.file(name)
        return _file(self.config.tokenizer, name, None)


def _file(source: str, name: str, revision: str | None) -> Path | None:
    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def write_model_files(base: Base, folder: Path, changes: dict[str, Any]) -> None:
    """Write config.json with `changes` and the precision, and copy what needs no change."""
    changes = {**changes, "dtype": str(DTYPES[base.config.dtype]).removeprefix("torch.")}
    config = read_json(_needed(base.file(CONFIG_NAME), CONFIG_NAME))
    if "torch_dtype" in config:
        config["torch_dtype"] = changes["dtype"]
    write_json(folder / CONFIG_NAME, readable_config(config | changes))
    found = {name: base.file(name) for name in OF_MODEL} | {name: base.tokenizer_file(name) for name in OF_TOKENIZER}
    for name, source in found.items():
        if source is not None:
            shutil.copyfile(source, folder / name)
            (folder / name).chmod(usual_mode())


def write_tokenizer_files(base: Base, core: Tokenizer, folder: Path, template: Callable[[str], str]) -> None:
    """Write the tokenizer, with `template` applied to each of its chat templates, each in its place."""
    with atomic_write(folder / TOKENIZER_NAME) as file:
        file.write(core.to_str(pretty=True))
    source = base.tokenizer_file(TOKENIZER_CONFIG_NAME)
    config = read_json(source) if source else {}
    tokenizer = base.tokenizer
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if getattr(tokenizer, name, None) is not None:
            config.setdefault(name, getattr(tokenizer, name))
    config["added_tokens_decoder"] = {
        str(token.pop("id")): token for token in json.loads(core.to_str())["added_tokens"]
    }
    within = config.get("chat_template")
    if isinstance(within, str):
        config["chat_template"] = template(within)
    elif isinstance(within, list):
        config["chat_template"] = [one | {"template": template(one["template"])} for one in within]
    write_json(folder / TOKENIZER_CONFIG_NAME, readable_tokenizer_config(config, list(tokenizer.model_input_names)))
    names = [TEMPLATE_NAME]
    if isinstance(tokenizer.chat_template, dict):
        names += [f"{_MORE_TEMPLATES}/{name}.jinja" for name in tokenizer.chat_template]
    for name in names:
        source = base.tokenizer_file(name)
        if source is not None:
            with atomic_write(folder / name) as file:
                file.write(template(source.read_text(encoding="utf-8")))


def _needed(path: Path | None, name: str) -> Path:
    if path is None:
        raise FileNotFoundError(name)
    return path
