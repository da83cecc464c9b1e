"""Each image of deploy/compose holds what its code imports: its rooms, and what its extra installs."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNS = {
    "web": ("webapp.gunicorn_conf", "webapp.main", "webapp.gunicorn_worker"),
    "worker": ("workers.app", "workers.host.main", "workers.weights.resolve"),
    "flower": (
        "cli.main",
        "cli.catalogue",
        "cli.dead_letters",
        "config_db.migrate",
        "flower.command",
        "kombu.transport.redis",
    ),
}
"""What is started in each image. The hosts' families are left out: torch takes seconds to import."""

IMPORT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"{{name}} is not in this image", name=name)

sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    __import__(module)
"""


@pytest.mark.parametrize("role", RUNS)
def test_an_image_holds_what_its_code_imports(role: str) -> None:
    done = _import(RUNS[role], absent=_absent(role))
    assert done.returncode == 0, done.stderr


def test_a_module_that_an_image_lacks_is_noticed() -> None:
    """The test above can fail: the API's image cannot run the command line."""
    done = _import(("cli.main",), absent=_absent("web"))
    assert done.returncode != 0
    assert "cli is not in this image" in done.stderr


def test_the_api_has_no_torch() -> None:
    assert "torch" in _absent("web")
    assert "torch" not in _absent("worker")


def _import(modules: tuple[str, ...], *, absent: Collection[str]) -> "subprocess.CompletedProcess[str]":
    program = IMPORT.format(absent=set(absent), modules=modules)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)


@cache
def _absent(role: str) -> frozenset[str]:
    """Top-level modules that are installed here and would not be in the image."""
    dockerfile = (ROOT / f"deploy/compose/Dockerfile.{role}").read_text()
    (extra,) = re.findall(r"'\.\[(\w+)\]'", dockerfile)
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M) for word in line.split()}
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    present = _installed_with(extra)
    foreign = {
        module
        for module, owners in packages_distributions().items()
        if present.isdisjoint(map(canonicalize_name, owners))
    }
    return frozenset((foreign - rooms) | (rooms - copied))


def _installed_with(extra: str) -> set[str]:
    """The distributions that installing the project with an extra brings."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra])]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in found or requirement.extras:
            waiting += _needs_of(requirement)
        found.add(name)
    return found


def _needs_of(requirement: Requirement) -> Iterator[Requirement]:
    try:
        listed = requires(requirement.name) or []
    except PackageNotFoundError:  # of another platform
        return
    for needed in map(Requirement, listed):
        if needed.marker is None or any(needed.marker.evaluate({"extra": one}) for one in ("", *requirement.extras)):
            yield needed
