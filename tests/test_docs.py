"""What stands in README and docs works: commands, Python, settings, links, quoted messages."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from adept_ds.cli.main import MODULES
from adept_ds.config import recipes
from adept_ds.config.run import RunConfig
from adept_ds.config.schema import declared_settings, method_docs
from tests.documents import CODE, PAGES, Block, blocks, commands
from tests.ranks import REPOSITORY, fork_ranks

README = REPOSITORY / "README.md"
EXTENDING = REPOSITORY / "docs" / "extending.md"
TROUBLES = [REPOSITORY / "docs" / name for name in ("troubleshooting.md", "slurm.md")]
OF_OTHERS = ("killed by signal 9", "module: command not found")
"""Messages of the system that troubleshooting explains."""
README_LINES = 150
CHAT = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}</s>{% endgeneration %}{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ids = {"ids": lambda page: page.stem}


def code_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in CODE]


@pytest.mark.parametrize("page", PAGES, **ids)
def test_every_block_is_tried_or_says_why_not(page: Path) -> None:
    silent = [
        block.where
        for block in code_blocks(page)
        if (block.language not in ("sh", "python") and not block.marks)
        or len(block.marks.get("not run", "a good reason").split()) < 2
    ]
    assert not silent


@pytest.mark.parametrize("page", PAGES, **ids)
def test_no_code_hides_from_the_fences(page: Path) -> None:
    """Markdown also takes lines that are indented by four for code."""
    fenced = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\n\n( {4}\S.*)", fenced) == []


def test_the_readme_is_read_to_the_end() -> None:
    assert len(README.read_text().splitlines()) <= README_LINES


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, **ids)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", page.read_text()):
        link = target[0] or target[1]
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, place = link.partition("#")
        file = page.parent / name if name else page
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if place and file.is_file() else []
        if not file.exists() or (place and place not in map(anchor, headings)):
            broken.append(link)
    assert not broken


def test_every_page_is_found_from_the_readme() -> None:
    named = set(re.findall(r"\]\(docs/([\w-]+\.md)", README.read_text()))
    assert named == {page.name for page in PAGES if page.parent.name == "docs"}


@pytest.mark.parametrize("page", PAGES, **ids)
def test_files_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"<!-- (new file|file): .*", "", page.read_text())
    named = set(re.findall(r"(?<![\w/.])(?:launchers|evals|ds_configs|adept_ds|tests)/[\w./]*\w", text))
    made = {block.marks["new file"] for block in blocks(page) if "new file" in block.marks}
    shown = {"adept_ds/backbone/architectures/NAME.json", "adept_ds/1"} | made | {"launchers/slurm/site.json"}
    assert [name for name in sorted(named - shown) if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, **ids)
def test_commands_and_settings_are_there(page: Path) -> None:
    """Of blocks that are not run, too."""
    settings = {key for method in method_docs() for key in declared_settings(method)}
    wrong = []
    for block in code_blocks(page):
        for command in commands(block) if block.language == "sh" else ():
            if program := re.search(r"adept-ds ([a-z][\w-]*)", command):
                wrong += [f"{block.where}: {program[1]}"] if program[1] not in MODULES else []
            # What is above a setting that is an object stands for any key of it, as in train.schedule_options.
            for key in re.findall(r"--((?:model|method|data|train|eval|logging)\.[\w.]+)", command):
                wrong += [f"{block.where}: {key}"] if not {key, key.rpartition(".")[0]} & settings else []
            for name in re.findall(r"--config (\w+)(?= |$)", command):
                wrong += [f"{block.where}: {name}"] if name not in recipes.shipped_configs() else []
    assert not wrong


@pytest.mark.parametrize("page", PAGES, **ids)
def test_settings_that_are_shown_are_right(page: Path) -> None:
    for block in code_blocks(page):
        if "settings" in block.marks:
            base = {"model": {"name_or_path": "x"}, "train": {"max_steps": 1000}}
            given = json.loads(block.text)
            RunConfig.model_validate(base | {name: {**base.get(name, {}), **part} for name, part in given.items()})


class Shell:
    """Runs a page's blocks in one folder. Python programs are forked, which saves them the libraries' loading."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.printed = ""
        self._count = 0

    def run(self, block: Block) -> None:
        """Do with a block what its marks say."""
        if "not run" in block.marks or "settings" in block.marks:
            return
        if "output" in block.marks:
            for line in filter(None, map(str.strip, block.text.splitlines())):
                pattern = ".*".join(map(re.escape, line.split("...")))
                assert re.search(pattern, self.printed), f"{block.where}: {line!r} is not in\n{self.printed}"
        elif "file" in block.marks:
            for name in block.marks["file"].split():
                (self.folder / name).write_text(block.text)
        elif block.language == "python":
            self.check(block, self.call(self.program(block.text)))
        elif block.language == "sh":
            self.printed = ""
            for command in commands(block):
                self.check(block, self.call(command))

    def check(self, block: Block, done: subprocess.CompletedProcess[str]) -> None:
        self.printed += done.stdout
        expected = int(block.marks.get("status", 0))
        assert done.returncode == expected, f"{block.where}: {done.args} ended with {done.returncode}\n{done.stdout}"

    def program(self, text: str) -> str:
        self._count += 1
        (self.folder / f"block_{self._count}.py").write_text(text)
        return f"python block_{self._count}.py"

    def call(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run one command line."""
        words = shlex.split(command, comments=True)
        is_simple = not set(command) & set("|<>;&") or "'" in command or '"' in command
        if is_simple and words[0] == "adept-ds":
            return self.fork(0, "adept_ds", *words[1:])
        if is_simple and words[0] == "python":
            return self.fork(0, *(words[2:] if words[1] == "-m" else words[1:]))
        if words[0] == "make":
            command = f"make --dry-run --always-make --directory {REPOSITORY} {shlex.join(words[1:])}"
        return self.bash(command)

    def fork(self, ranks: int, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        self._count += 1
        logs = self.folder / f".logs-{self._count}"
        logs.mkdir()
        return fork_ranks(ranks, script, *arguments, environment=self.environment, logs=logs, folder=self.folder)

    def bash(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def models(tiny_llama: Path, tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small stand-ins for the models that pages name."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_llama, folder / "smollm2-135m-instruct")
    shutil.copytree(tiny_t5, folder / "t5")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "smollm2-135m-instruct")
    return folder


@pytest.fixture
def shell(models: Path, environment: dict[str, str], tmp_path: Path) -> Shell:
    """In a folder that looks like the repository's, with models."""
    for name in ("adept_ds", "launchers", "evals", "ds_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "models").symlink_to(models)
    (tmp_path / "runs").mkdir()
    # A command that bash starts is the environment's; the folder's own link must not be taken for the package.
    return Shell(tmp_path, environment | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"})


@pytest.mark.parametrize("page", [page for page in PAGES if page != EXTENDING], **ids)
def test_what_a_page_tells_to_do_works(page: Path, shell: Shell) -> None:
    for block in code_blocks_and_output(page):
        shell.run(block)


def code_blocks_and_output(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in CODE or "output" in block.marks]


class Copy(Shell):
    """In a copy of the repository, which the blocks change; programs have to be loaded anew."""

    def run(self, block: Block) -> None:
        if "new file" in block.marks:
            (self.folder / block.marks["new file"]).write_text(block.text)
        elif "in" in block.marks:
            name, side, text = re.fullmatch(r"(\S+), (before|after): (.*)", block.marks["in"]).groups()
            path = self.folder / name
            lines = path.read_text().splitlines(keepends=True)
            at = next(number for number, line in enumerate(lines) if text in line) + (side == "after")
            path.write_text("".join([*lines[:at], block.text, *lines[at:]]))
        else:
            super().run(block)

    def call(self, command: str) -> subprocess.CompletedProcess[str]:
        return self.bash(re.sub(r"^adept-ds\b", "python -m adept_ds", command))


@pytest.mark.slow
def test_the_walks_of_extending_lead_there(models: Path, environment: dict[str, str], tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("adept_ds", "ds_configs", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored, symlinks=True)
    shutil.copy(REPOSITORY / "setup.cfg", tmp_path)
    (tmp_path / "models").symlink_to(models)
    path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    shell = Copy(tmp_path, environment | {"PYTHONPATH": str(tmp_path), "PATH": path})
    for block in code_blocks_and_output(EXTENDING):
        shell.run(block)


@pytest.mark.parametrize("page", TROUBLES, **ids)
def test_messages_that_are_explained_are_in_the_code(page: Path) -> None:
    files = [path for folder in ("adept_ds", "launchers") for path in (REPOSITORY / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".py", ".sh", ".sbatch")]
    # Long messages are written in several pieces.
    code = re.sub(r"\"\s*\n\s*f?\"", "", "\n".join(path.read_text() for path in files))
    tables = page.read_text().split("| message | meaning, and what to do |")[1:]
    rows = [row for table in tables for row in re.findall(r"^\| `([^`]+)`", table.partition("\n\n")[0], re.MULTILINE)]
    assert len(rows) > 10
    # A word in capitals stands for a name, as dots do.
    parts = {row: re.split(r"\.\.\.|\b[A-Z]+\b(?= |$)|'x'", row) for row in rows if row not in OF_OTHERS}
    assert [row for row in parts if not all(part.strip() in code for part in parts[row])] == []
