"""Batch scripts: those of `launchers/slurm`, which come with the package, made complete for one submission.

Each has three parts behind marker lines. The resources (`#SBATCH` lines) are replaced, the site is filled in, and the
job itself stays as it is, with the file that it sources in its place.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from adept_ds.errors import UserError
from adept_ds.slurm.site import SiteConfig

SCRIPTS = Path(__file__).resolve().with_name("scripts")
"""`launchers/slurm` of the repository."""
RESOURCES, SITE, JOB = (f"# --- {part} " for part in ("resources", "site", "job"))
_PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+", re.ASCII)


def render(template: Path, options: Sequence[str], site: Sequence[str], arguments: Sequence[str]) -> str:
    """Return a batch script.

    Args:
        template: One of the scripts in `launchers/slurm`.
        options: Options of sbatch, one an item.
        site: Lines of bash for the site.
        arguments: What the script is called with.
    """
    head, marker, rest = _cut(template.read_text(encoding="utf-8"), RESOURCES, template)
    _, site_marker, rest = _cut(rest, SITE, template)
    between, job_marker, body = _cut(rest, JOB, template)
    lines = [
        *(f"#SBATCH {quote_option(option)}" for option in options),
        site_marker,
        *between.splitlines(),
        *site,
        f"set -- {shlex.join(arguments)}",
        job_marker,
    ]
    return head + marker + "\n" + "\n".join(lines) + "\n" + _with_sources(body, template.parent)


def _cut(text: str, start: str, template: Path) -> tuple[str, str, str]:
    """Text before the line that starts so, that line, and text behind it."""
    found = re.search(rf"^{re.escape(start)}.*$", text, re.MULTILINE)
    if found is None:
        raise UserError(f"{template}: there is no line {start.strip()!r}; expected a script of {SCRIPTS}")
    return text[: found.start()], found[0], text[found.end() + 1 :]


def _with_sources(body: str, folder: Path) -> str:
    """The job's part with each file of `launchers/slurm` that it sources in the place of that line."""

    def inline(found: re.Match[str]) -> str:
        lines = (folder / found[1]).read_text(encoding="utf-8").rstrip().splitlines()
        return "\n".join(line for line in lines if not line.startswith("# shellcheck"))

    source = r"(?:^# slurmd runs a copy .*\n)?(?:^# shellcheck source=.*\n)?^source .*/(\w+\.sh)\" \|\| exit 1$"
    return re.sub(source, inline, body, flags=re.MULTILINE)


def quote_option(option: str) -> str:
    """Quote an option for an #SBATCH line: a backslash escapes within quotes too, and # starts a comment outside."""
    if _PLAIN.fullmatch(option):
        return option
    name, equals, value = option.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"' if equals else f'"{option}"'


def quote_variable(value: str) -> str:
    """Quote a value for bash so that $NAME and ${NAME} in it are variables and everything else stands for itself."""
    if "$" not in value:
        return shlex.quote(value)
    escaped = re.sub(r'[\\"`]|\$(?![A-Za-z_]|\{[A-Za-z_]\w*\})', lambda found: f"\\{found[0]}", value)
    return f'"{escaped}"'


def site_lines(
    site: SiteConfig, root: Path | None, python: str, binds: Sequence[Path], more: Mapping[str, str]
) -> list[str]:
    """Lines of bash that make a node's shell as the site wants it.

    Args:
        site: The site.
        root: The repository; None where the package is installed.
        python: Interpreter of the ranks.
        binds: Folders that a container must see.
        more: Further environment variables, of less weight than the site's own.
    """
    own = {
        "ADEPT_DS_ROOT": shlex.quote(str(root or "")),
        "ADEPT_DS_PYTHON": shlex.quote(python),
        "ADEPT_DS_MAX_RESTARTS": str(site.max_restarts),
        "ADEPT_DS_WARNING_SECONDS": str(site.warning_seconds),
    }
    if site.container and site.container_runtime == "pyxis":
        own["ADEPT_DS_CONTAINER_IMAGE"] = shlex.quote(site.container)
        # Unlike apptainer's, a path of pyxis names both sides.
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in (*map(str, binds), *site.container_mounts)]
        own["ADEPT_DS_CONTAINER_MOUNTS"] = shlex.quote(",".join(dict.fromkeys(mounts)))
        own["ADEPT_DS_TOOL_PYTHON"] = shlex.quote(sys.executable)
    elif site.container:
        own["ADEPT_DS_CONTAINER"] = shlex.quote(f"{site.container_command} {site.container}")
        own["APPTAINER_BINDPATH"] = shlex.quote(",".join(dict.fromkeys([*map(str, binds), *site.container_mounts])))
    if site.scratch:
        own["ADEPT_DS_SCRATCH"] = quote_variable(site.scratch)
    if site.stage_weights:
        own["ADEPT_DS_STAGE"] = "1"
    if site.offline:
        own["HF_HUB_OFFLINE"] = "1"
    own |= {name: quote_variable(value) for name, value in {**more, **site.env}.items()}
    return [
        "# A warning that comes before the job's own handling of it must not end this shell, and is not forgotten.",
        "trap 'warned=1' USR1",
        *(f"module load {shlex.quote(name)} || exit 1" for name in site.modules),
        *site.setup,
        *(f"export {name}={value}" for name, value in own.items()),
    ]
