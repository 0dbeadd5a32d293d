"""The images: both are built from wheels alone, and hold what the jobs of a cluster ask for."""

from __future__ import annotations

import json
import re

import pytest

from adept_ds.slurm.site import SiteConfig
from tests.ranks import REPOSITORY

FOLDER = REPOSITORY / "launchers" / "containers"
FILES = ("Dockerfile", "adept_ds.def")


def instructions(name: str) -> str:
    """A file without its comments; lines that a backslash joins are one."""
    lines = (FOLDER / name).read_text().splitlines()
    return re.sub(r"\s*\\\n\s*", " ", "\n".join(line for line in lines if not line.startswith("#")))


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_fetched_while_an_image_is_built(name: str) -> None:
    text = instructions(name)
    assert re.findall(r"\b(apt|apt-get|dnf|yum|curl|wget|git|conda|ADD|pip download)\b", text) == []
    assert "pip install --no-index --find-links /wheels" in text
    # Such a line makes Docker fetch the program that reads the rest.
    assert not re.search(r"^#\s*syntax\s*=", (FOLDER / name).read_text(), re.MULTILINE)


def test_both_images_are_made_by_the_same_commands() -> None:
    docker, apptainer = ([*re.findall(r"\S+/python -m pip [^\n&]+", instructions(name))] for name in FILES)
    assert [command.strip() for command in docker] == [command.strip() for command in apptainer] != []


@pytest.mark.parametrize("name", FILES)
def test_the_base_image_is_an_argument(name: str) -> None:
    assert re.search(
        r"^(FROM \$\{BASE\}|Bootstrap: localimage\nFrom: \{\{ BASE \}\})$", instructions(name), re.MULTILINE
    )


@pytest.mark.parametrize("name", FILES)
def test_the_interpreter_that_jobs_ask_a_container_for_is_the_one_with_the_packages(name: str) -> None:
    example = json.loads((REPOSITORY / "launchers" / "slurm" / "sites" / "offline_container.json").read_text())
    site = SiteConfig.model_validate(example)
    assert site.python is None  # then it is python3, see `Cluster.python`
    assert site.container is not None
    assert site.container.endswith("adept_ds.sif")
    assert re.search(r"(ENV|export) PATH=/opt/adept_ds/bin:\$PATH", instructions(name))
