"""The model card of an adapter, of a fully tuned model, or of what `adept-ds export` has written: README.md with the
metadata that the hub reads, from `model_card.md.jinja`.

Here is what the folder itself says; `adept_ds.reports.model_card` adds what its run does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from adept_ds.backbone.hub import is_local
from adept_ds.errors import UserError
from adept_ds.files import read_json
from adept_ds.storage.adapter_folder import CONFIG_NAME, TENSORS_NAME, load_adapter
from adept_ds.storage.model_folder import TRAINING_NAME

README_NAME = "README.md"
TEMPLATE = "model_card.md.jinja"
ADAPTER, MODEL = "adapter", "model"
ENGINES = {"gguf": "llama.cpp", "onnx": "ONNX Runtime GenAI", "openvino": "OpenVINO GenAI"}
"""Forms that programs of their own read."""
LIBRARIES = {ADAPTER: "adept_ds", "lora": "peft", "peft": "peft", **{form: form for form in ENGINES}}
"""Form of a folder to the library that loads it; `transformers` for those that are whole models."""
OF_MANIFEST = ("prompt_tokens", "prompt_in", "serving_base", "verification", "text_prefix")
"""Fields of an export's manifest that its card shows."""
RELATIONS = {ADAPTER: "adapter", "lora": "adapter", "peft": "adapter"}
"""The hub's word for what a folder is to its base; `finetune` for those that are whole models."""


@dataclass(frozen=True)
class CardSubject:
    """What a card is of."""

    folder: Path
    form: str
    """`adapter`, `model` (fully tuned), or a form of exports: `folded`, `lora`, `peft`, `serving-base`."""
    base: dict[str, Any]
    """The backbone: its name, revision and sizes."""
    method: dict[str, Any]
    """The method's settings; empty for a serving base."""
    sha256: str | None
    """Of the adapter's tensors, by which its evaluations are known."""
    versions: dict[str, str]
    parameters: int | None = None
    """Trained numbers in the folder; None where they are not in it by themselves."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Of an export: what it was made of and how it is read."""

    @property
    def origin(self) -> Path:
        """The folder of the adapter that this is of or was made of, in whose run evaluations are looked for."""
        return Path((self.manifest.get("adapter") or {}).get("folder") or self.folder)

    @property
    def files(self) -> list[str]:
        """Names of the files that are for others; a checkpoint's folder has more."""
        if self.form == ADAPTER:
            return [CONFIG_NAME, TENSORS_NAME]
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())


@dataclass(frozen=True)
class CardResult:
    """A figure of an evaluation, in fractions."""

    dataset: str
    """What it was evaluated on, as a person calls it."""
    dataset_id: str
    """The same for the hub's metadata."""
    split: str | None
    metric: str
    value: float
    low: float
    high: float
    """The 95 % interval."""
    examples: int
    baseline: float | None
    """The backbone's figure on the same examples."""


@dataclass(frozen=True)
class CardRun:
    """What a run adds to a card."""

    results: Sequence[CardResult] = ()
    findings: Sequence[str] = ()
    """Sentences that compare the figures with the backbone's."""
    protocol: Mapping[str, str] = field(default_factory=dict)
    """How the evaluations were made: label to text."""
    data: Mapping[str, str] = field(default_factory=dict)
    """What was trained on: label to text."""
    training: Mapping[str, str] = field(default_factory=dict)
    """Settings and figures of the training: label to text."""
    name: str = ""
    """Of its folder."""
    about: str = ""
    """What its config says it is for."""


def read_subject(folder: Path) -> CardSubject:
    """Read what an adapter or a fully tuned model says about itself; of exports see `adept_ds.reports.model_card`.

    Raises:
        UserError: The folder holds neither, or a file of it is damaged.
    """
    if (folder / TRAINING_NAME).is_file():
        facts = read_json(folder / TRAINING_NAME)
        return CardSubject(folder, MODEL, facts["backbone"], facts["method"], None, facts["versions"])
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"{folder}: expected an adapter ({CONFIG_NAME}), a fully tuned model ({TRAINING_NAME}), or a folder that "
            "`adept-ds export` has written (adept_export.json)"
        )
    adapter = load_adapter(folder)
    return CardSubject(
        folder,
        ADAPTER,
        adapter.backbone,
        adapter.method.model_dump(mode="json"),
        adapter.facts.get("tensors_sha256"),
        adapter.facts.get("versions", {}),
        adapter.trained_parameters,
    )


def make_card(
    subject: CardSubject,
    run: CardRun | None = None,
    base: str | None = None,
    repository: str | None = None,
    license_name: str | None = None,
) -> ModelCard:
    """Return the card.

    Args:
        subject: What it is of.
        run: What its run says; None if there is none.
        base: The base's hub id, where the folder names a local one.
        repository: Hub id under which the folder will be found; the folder's name stands for it if None.
        license_name: The hub's name of the licence; without it the metadata say nothing of one.
    """
    run = run or CardRun()
    base_id = base or hub_base(subject)
    peft_type = _peft_type(subject.folder)
    relation = RELATIONS.get(subject.form, "finetune")
    tags = ["adept_ds", *filter(None, [subject.method.get("name")])]
    tags += [subject.form] if subject.form not in (ADAPTER, MODEL) else []
    tags += [f"base_model:{relation}:{base_id}"] if base_id else []
    tags += [peft_type.lower()] if peft_type else []
    name = (repository or run.name or subject.folder.resolve().name).rpartition("/")[2]
    is_seq2seq = _is_encoder_decoder(subject)
    results = [_metadata(result, is_seq2seq) for result in run.results]
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=relation if base_id else None,
        library_name=LIBRARIES.get(subject.form, "transformers"),
        license=license_name,
        pipeline_tag="text2text-generation" if is_seq2seq else "text-generation",
        tags=list(dict.fromkeys(tags)),
        eval_results=results or None,
        model_name=name if results else None,
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("adept_ds.storage", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        name=name,
        subject=subject,
        method=subject.method,
        settings=json.dumps(_without_places(subject.method), indent=2),
        run=run,
        base=base_id or Path(subject.base.get("name_or_path") or "its base").name,
        source=repository or "PATH/TO/THIS/FOLDER",
        auto="AutoModelForSeq2SeqLM" if is_seq2seq else "AutoModelForCausalLM",
        versions={**subject.versions, "this card": f"adept_ds {version('adept_ds')}"},
        is_seq2seq=is_seq2seq,
        engines=ENGINES,
        prompt_ids=list(subject.manifest.get("prompt_token_ids") or ()),
        **{key: subject.manifest.get(key) for key in OF_MANIFEST},
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", text))


def hub_base(subject: CardSubject) -> str | None:
    """The backbone's hub id: its name, where a commit shows that it was loaded from the hub."""
    name = subject.base.get("name_or_path")
    return str(name) if name and subject.base.get("revision") and not is_local(name) else None


def _without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given, folders of this machine by the last part of their names."""

    def last(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: last(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [last(one) for one in value]
        return Path(value).name if isinstance(value, str) and is_local(value) else value

    folders = ("init_from", "sources", "teachers")
    return {key: last(one) if key in folders else one for key, one in settings.items() if one is not None}


def _is_encoder_decoder(subject: CardSubject) -> bool:
    model_type = subject.base.get("model_type")
    return bool(model_type and AutoConfig.for_model(model_type).is_encoder_decoder)


def _peft_type(folder: Path) -> str | None:
    """PEFT's name of the method of a folder in its form."""
    path = folder / CONFIG_NAME
    return read_json(path).get("peft_type") if path.is_file() else None


def _metadata(result: CardResult, is_seq2seq: bool) -> EvalResult:
    return EvalResult(
        task_type="text2text-generation" if is_seq2seq else "text-generation",
        dataset_type=result.dataset_id,
        dataset_name=result.dataset,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_name=f"{result.metric}, 95 % interval {result.low:.3f} to {result.high:.3f}, n = {result.examples}",
        metric_value=round(result.value, 4),
    )
