"""From an adapter to a folder that other programs load, or from a backbone to a serving base.

A folder is written under a temporary name, loaded again and compared with the live model, and renamed when it has come
to the same; where it has not, nothing stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase

from adept_ds.backbone.hub import is_local
from adept_ds.backbone.load import DTYPES, load_backbone, load_tokenizer
from adept_ds.backbone.table import OpenTable, open_table, stored_dtype
from adept_ds.backbone.weight_files import fingerprint
from adept_ds.config.run import ModelConfig
from adept_ds.data.fit import most_positions
from adept_ds.errors import UserError
from adept_ds.export.checkpoint import rewrite
from adept_ds.export.embedding_lora import EmbeddingLora, write_embedding_lora
from adept_ds.export.forms import FOLDED, LORA, PEFT, check_form
from adept_ds.export.hub_folder import Base, write_model_files, write_tokenizer_files
from adept_ds.export.manifest import SERVING_BASE, Manifest, read_manifest, versions, write_manifest
from adept_ds.export.merging import merged
from adept_ds.export.peft_folder import write_peft_folder
from adept_ds.export.prompt_tokens import (
    TEMPLATE_LENGTH,
    PromptTokens,
    add_prompt_tokens,
    adjustable_template,
    prompted_template,
    with_prompt_in_front,
)
from adept_ds.export.token_table import TokenTable, loaded_method, task_number
from adept_ds.export.verification import NEW_TOKENS, Agreement, Batch, chat_ids, check, compare, live_batches
from adept_ds.export.vocabulary import Vocabulary, refuse_composite
from adept_ds.methods import create_method
from adept_ds.methods.prompted import PromptedMethod
from adept_ds.model.adapted_model import AdaptedModel
from adept_ds.storage.adapter_folder import Adapter, backbone_facts, check_backbone

BOTH, TEXT, CHAT, NONE = "both", "text", "chat", "none"


def prompt_places(prompt_in: str) -> tuple[bool, bool]:
    """Whether the tokenizer puts the soft prompt in front of plain text, and whether the chat template does."""
    return prompt_in in (BOTH, TEXT), prompt_in in (BOTH, CHAT)


@dataclass(frozen=True)
class Request:
    """What is to be exported, and how."""

    adapter: Adapter
    model: ModelConfig
    """The adapter's backbone; its `dtype` is what is written."""
    out: Path
    task: str | None = None
    prompt_in: str = BOTH
    verify: bool = True
    device: str = "cpu"
    """Where models are loaded for the verification."""

    @property
    def length(self) -> int:
        """Vectors of the soft prompt, l."""
        return self.adapter.method.num_virtual_tokens


def backbone_of(
    adapter: Adapter,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    tokenizer: str | None = None,
) -> ModelConfig:
    """Return where the backbone of an adapter is, and in which precision it is to be written.

    Args:
        adapter: The adapter.
        base: Hub id or folder, in place of what the adapter names.
        revision: Commit or branch of the hub, in place of the one on record.
        dtype: Precision; that of the checkpoint if None.
        tokenizer: Where its tokenizer is; with the backbone if None.

    Raises:
        UserError: The adapter names none, or there is no checkpoint.
    """
    name = base or adapter.backbone.get("name_or_path")
    if not name:
        raise UserError(f"{adapter.folder} does not say which backbone it belongs to; name it by --base")
    revision = revision or (None if base else adapter.backbone.get("revision"))
    config = ModelConfig(name_or_path=name, revision=revision, tokenizer=tokenizer)
    return config.model_copy(update={"dtype": dtype or stored_dtype(config)})


def export_folded(request: Request) -> Agreement | None:
    """Write a hub folder of the tuned model, which no code of ours is needed for.

    Returns:
        How it compares with the live model; None where that was not asked for.

    Raises:
        UserError: The method cannot be exported so, the adapter belongs to another backbone, `out` is there already, or
            what was written computes something else than the live model.
    """
    check_form(request.adapter.method, FOLDED)
    with new_folder(request.out) as folder:
        folded = write_folded(request, folder)
        agreement = _verify_folded(request, folder, folded) if request.verify else None
        verification = asdict(agreement) if agreement else None
        write_manifest(folder, folded.manifest.model_copy(update={"verification": verification}))
    return agreement


@dataclass(frozen=True)
class Folded:
    """What was written as a hub folder."""

    tokenizer: PreTrainedTokenizerBase
    """The backbone's."""
    prompt: PromptTokens
    task: int
    manifest: Manifest
    """Not written yet, and without a verification."""


def write_folded(request: Request, folder: Path) -> Folded:
    """Write the tuned model into an existing folder. Raises: As `export_folded`, but compares nothing."""
    adapter, config = request.adapter, request.model
    task = task_number(adapter, request.task)
    base = Base(config, load_tokenizer(config))
    core, prompt = add_prompt_tokens(base.tokenizer, request.length)
    with open_table(config) as opened:
        facts = _checked_facts(adapter, opened)
        dtype = DTYPES[config.dtype]
        if isinstance(create_method(adapter.method), PromptedMethod):
            vocabulary = Vocabulary(opened, dtype)
            table = TokenTable.of(loaded_method(adapter, opened), prompt.ids, task)
            changes = vocabulary.folded(table.parts, table.rows, prompt.ids)
        else:
            changes = merged(adapter, opened, dtype)
        files = rewrite(opened.paths, folder, changes.changed, changes.added, dtype)
        weights = fingerprint(opened.paths)
    write_model_files(base, folder, changes.config)
    in_text, in_chat = prompt_places(request.prompt_in)
    if request.length and in_text:
        core = with_prompt_in_front(core, prompt)
    write_tokenizer_files(base, core, folder, partial(prompted_template, names=prompt.names if in_chat else ()))
    manifest = Manifest(
        form=FOLDED,
        base={**facts, "weights_fingerprint": weights},
        adapter=_adapter_facts(adapter, request.task),
        prompt_tokens=prompt.names,
        prompt_token_ids=prompt.ids,
        prompt_in=request.prompt_in if request.length else NONE,
        dtype=config.dtype,
        files=files,
        versions=versions(),
    )
    return Folded(base.tokenizer, prompt, task, manifest)


def export_serving_base(model: ModelConfig, rows: int, out: Path) -> None:
    """Write a backbone with so many more tokens, for prompts of up to that length.

    Raises:
        UserError: There is no such backbone, or `out` is there already.
    """
    base = Base(model, load_tokenizer(model))
    with new_folder(out) as folder:
        core, prompt = add_prompt_tokens(base.tokenizer, rows)
        with open_table(model) as opened:
            refuse_composite(opened)
            facts = backbone_facts(opened.backbone)
            vocabulary = Vocabulary(opened, DTYPES[model.dtype])
            size = max(vocabulary.rows, max(prompt.ids) + 1)
            changes = vocabulary.longer(size, prompt.ids)
            files = rewrite(opened.paths, folder, changes.changed, changes.added, DTYPES[model.dtype])
            weights = fingerprint(opened.paths)
        write_model_files(base, folder, changes.config)
        write_tokenizer_files(base, core, folder, partial(adjustable_template, names=prompt.names))
        write_manifest(
            folder,
            Manifest(
                form=SERVING_BASE,
                base={**facts, "weights_fingerprint": weights},
                prompt_tokens=prompt.names,
                prompt_token_ids=prompt.ids,
                dtype=model.dtype,
                files=files,
                versions=versions(),
            ),
        )


def export_lora(request: Request, serving_base: Path) -> Agreement | None:
    """Write a PEFT folder that makes the tuned model of a serving base.

    Returns, raises: As `export_folded`; also where the serving base is not one of the adapter's backbone, or has too
        few tokens.
    """
    adapter, config = request.adapter, request.model
    check_form(adapter.method, LORA)
    task = task_number(adapter, request.task)
    served = read_manifest(serving_base)
    if served.form != SERVING_BASE:
        raise UserError(
            f"--serving-base {serving_base} is an export of the form {served.form!r}; expected one that "
            "`adept-ds export --serving-base --rows L --out DIR` wrote"
        )
    if len(served.prompt_token_ids) < request.length:
        raise UserError(
            f"--serving-base {serving_base} has {len(served.prompt_token_ids)} tokens for prompts, and the prompt of "
            f"{adapter.folder} has {request.length}; make one with --rows {request.length} or more"
        )
    prompt = PromptTokens(
        tuple(served.prompt_tokens[: request.length]), tuple(served.prompt_token_ids[: request.length])
    )
    check_backbone(adapter, served.base)
    serving = ModelConfig(name_or_path=str(serving_base.absolute()), dtype=served.dtype)  # type: ignore[arg-type]
    with new_folder(request.out) as folder, open_table(config) as opened, open_table(serving) as serving_table:
        facts = _checked_facts(adapter, opened)
        table = TokenTable.of(loaded_method(adapter, opened), prompt.ids, task)
        base_rows = serving_table.table.weight[list(prompt.ids)]
        lora = EmbeddingLora(table, serving_table.table.num_embeddings, base_rows)
        module = opened.name.removesuffix(".weight")
        is_encoder_decoder = opened.backbone.config.is_encoder_decoder
        files = write_embedding_lora(folder, lora, module, is_encoder_decoder, serving.name_or_path)
        agreement = _verify_lora(request, folder, serving, prompt, task) if request.verify else None
        write_manifest(
            folder,
            Manifest(
                form=LORA,
                base=facts,
                adapter=_adapter_facts(adapter, request.task),
                serving_base=serving.name_or_path,
                prompt_tokens=prompt.names,
                prompt_token_ids=prompt.ids,
                dtype="fp32",
                files=files,
                verification=asdict(agreement) if agreement else None,
                versions=versions(),
            ),
        )
    return agreement


def _checked_facts(adapter: Adapter, opened: OpenTable) -> dict[str, Any]:
    refuse_composite(opened)
    facts = backbone_facts(opened.backbone)
    check_backbone(adapter, facts)
    return facts


def _adapter_facts(adapter: Adapter, task: str | None) -> dict[str, Any]:
    return {
        "folder": str(adapter.folder),
        "tensors_sha256": adapter.facts["tensors_sha256"],
        "method": adapter.method.model_dump(mode="json"),
        "task": task,
    }


def export_peft(request: Request) -> Agreement | None:
    """Write a folder in PEFT's own format of the method. Returns, raises: As `export_folded`."""
    adapter, config = request.adapter, request.model
    check_form(adapter.method, PEFT)
    with new_folder(request.out) as folder, open_table(config) as opened:
        facts = _checked_facts(adapter, opened)
        name = config.name_or_path
        base = str(Path(name).absolute()) if is_local(name) else name
        files = write_peft_folder(folder, adapter, opened, base)
        agreement = _verify_peft(request, folder) if request.verify else None
        write_manifest(
            folder,
            Manifest(
                form=PEFT,
                base=facts,
                adapter=_adapter_facts(adapter, None),
                dtype="fp32",
                files=files,
                verification=asdict(agreement) if agreement else None,
                versions=versions(),
            ),
        )
    return agreement


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` that is renamed to it at the end, and removed after an exception.

    Raises:
        UserError: There is something at `out`.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} is there already; name a new folder, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _verify_folded(request: Request, folder: Path, folded: Folded) -> Agreement:
    batches, prompt = batches_of(request, folded.tokenizer, folded.task), folded.prompt
    written = AutoTokenizer.from_pretrained(folder)
    in_text, in_chat = prompt_places(request.prompt_in)

    def rows_of(batch: Batch) -> list[list[int]]:
        if batch.is_chat:
            rows = [chat_ids(written, text) for text in batch.texts]
        else:
            rows = [written(text)["input_ids"] for text in batch.texts]
        has_prompt = in_chat if batch.is_chat else in_text
        return rows if has_prompt else [[*prompt.ids, *row] for row in rows]

    _check_ids(batches, rows_of, prompt, "the tokenizer that was written")
    agreement = compare(batches, _loaded(folder, request), rows_of, prompt.ids)
    check(agreement, "the folder that was written")
    return agreement


def _verify_lora(request: Request, folder: Path, serving: ModelConfig, prompt: PromptTokens, task: int) -> Agreement:
    batches = batches_of(request, load_tokenizer(request.model), task)
    written = AutoTokenizer.from_pretrained(serving.name_or_path)

    def rows_of(batch: Batch) -> list[list[int]]:
        if batch.is_chat:
            return [chat_ids(written, text, **{TEMPLATE_LENGTH: len(prompt.ids)}) for text in batch.texts]
        return [[*prompt.ids, *written(text)["input_ids"]] for text in batch.texts]

    _check_ids(batches, rows_of, prompt, "the serving base's tokenizer")
    backbone = _loaded(serving.name_or_path, request)
    model = PeftModel.from_pretrained(backbone, folder).eval()
    agreement = compare(batches, model, rows_of, prompt.ids)
    check(agreement, "the LoRA on its serving base")
    return agreement


def _verify_peft(request: Request, folder: Path) -> Agreement:
    batches = batches_of(request, load_tokenizer(request.model), 0)

    def rows_of(batch: Batch) -> list[list[int]]:
        return batch.rows

    model = PeftModel.from_pretrained(_loaded(request.model.name_or_path, request), folder).eval()
    # PEFT puts a soft prompt in front of the padding, and counts that among the positions.
    agreement = compare(batches, model, rows_of, (), are_padded=False)
    check(agreement, "the folder in PEFT's format")
    return agreement


def batches_of(request: Request, tokenizer: PreTrainedTokenizerBase, task: int) -> list[Batch]:
    """Return prompts with what the live model makes of them.

    Raises:
        UserError: None of them fits into the backbone's positions.
    """
    backbone = load_backbone(request.model, torch.device(request.device))
    model = AdaptedModel.from_pretrained(backbone, request.adapter.folder)
    positions = most_positions(backbone.config)
    room = NEW_TOKENS + request.length
    batches = live_batches(model, tokenizer, task, None if positions is None else positions - room)
    if not batches:
        raise UserError(
            f"no prompt of the comparison fits into the positions of {request.model.name_or_path!r} beside the soft "
            "prompt; nothing was written. --no-verify writes without comparing"
        )
    return batches


def _loaded(folder: str | Path, request: Request) -> Any:
    """A model as anybody loads it."""
    dtype = DTYPES[request.model.dtype]
    is_encoder_decoder = AutoConfig.from_pretrained(folder, trust_remote_code=False).is_encoder_decoder
    auto: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, trust_remote_code=False).to(request.device).eval()


def _check_ids(
    batches: Sequence[Batch], rows_of: Callable[[Batch], list[list[int]]], prompt: PromptTokens, what: str
) -> None:
    """Refuse a tokenizer that reads a text as other tokens than the backbone's with the prompt in front."""
    for batch in batches:
        for text, row, ids in zip(batch.texts, batch.rows, rows_of(batch), strict=True):
            expected = [*prompt.ids, *row]
            if ids != expected:
                raise UserError(
                    f"{what} reads {text!r} as {ids}, and the live model as {expected}, with the prompt in front; "
                    "nothing was written"
                )
