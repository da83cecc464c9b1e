"""docs/gitops.md shows commands that there are and files that can be read."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from cli.main import app
from config_db.config_files import read_files

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gitops.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
FILES = [text for language, text in BLOCKS if language == "yaml"]
WORKFLOW: dict[str, Any] = yaml.safe_load(FILES[-1])
RUN = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
COMMANDS = [
    found
    for text in [*(text for language, text in BLOCKS if not language), *RUN]
    for found in re.findall(r"farmhand (config \w+ [^#>\n]*)", text)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command: str) -> None:
    """Its words are parsed as they would be on a terminal; nothing is run."""
    words = shlex.split(command)[1:]
    group: Any = typer.main.get_command(app)
    config = group.commands["config"]
    name, found, rest = config.resolve_command(config.make_context("config", words, resilient_parsing=True), words)
    assert found is not None
    found.make_context(name, rest)


@pytest.mark.parametrize(("status", "is_fine"), [(0, True), (2, True), (1, False), (127, False), (137, False)])
def test_the_plan_of_the_workflow_fails_unless_there_is_one(status: int, is_fine: bool, tmp_path: Path) -> None:
    """Not installed, killed or refused: a pull request without a plan is not one without changes."""
    (step,) = [run for run in RUN if "plan.txt" in run]
    said = {"GITHUB_STEP_SUMMARY": str(tmp_path / "summary"), "PATH": os.defpath}
    script = f"farmhand() {{ return {status}; }}\n{step}"
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=said, check=False)
    assert (done.returncode == 0) is is_fine


def test_every_command_is_shown() -> None:
    group: Any = typer.main.get_command(app)
    assert {command.split()[1] for command in COMMANDS} == set(group.commands["config"].commands)


def test_the_files_can_be_read(tmp_path: Path) -> None:
    for place, text in enumerate(FILES[:-1]):
        (tmp_path / f"{place}.yaml").write_text(text)
    found = read_files(tmp_path)
    assert found.faults == []
    assert found.spoken_of == {"model", "tenant", "pool", "setting"}
    assert [spec.id for spec in found.specs] == ["acme/support-search", "acme/small"]
