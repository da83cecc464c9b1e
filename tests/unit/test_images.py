"""What installs bring: each image holds what its code imports, and the lock names every distribution."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, EXTRAS = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]
LOCK = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
RUNS = {
    "web": ("webapp.gunicorn_conf", "webapp.main", "webapp.gunicorn_worker", "huggingface_hub.utils", "httpx"),
    "worker": ("workers.app", "workers.host.main", "workers.weights.resolve", "kombu.transport.redis", "msgpack"),
    "flower": (
        "cli.main",
        "cli.catalogue",
        "cli.changes",
        "cli.converging",
        "cli.export_folder",
        "cli.dead_letters",
        "config_db.migrate",
        "cli.flowerconfig",
        "flower.command",
        "kombu.transport.redis",
    ),
}
"""What is started in each image, and what is imported only when it is needed.

The hosts' families are left out: torch takes seconds to import.
"""

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


def test_the_lock_names_what_is_needed_and_nothing_else() -> None:
    """Of what is installed here: other platforms and builds of torch need more."""
    needed = _installed_with(*EXTRAS) | _closure(PYPROJECT["dependency-groups"]["dev"])
    here: dict[str, str] = {
        canonicalize_name(one.metadata["Name"]): one.version.partition("+")[0] for one in distributions()
    }
    locked = {canonicalize_name(name): version for name, version in LOCK.items()}
    assert {name: here[name] for name in needed & here.keys()}.items() <= locked.items()
    assert (locked.keys() & here.keys()) - needed <= {"setuptools"}


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


def _installed_with(*extras: str) -> set[str]:
    """The distributions that installing the project with these extras brings."""
    return _closure([*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])])


def _closure(requirements: Sequence[str]) -> set[str]:
    """What is needed, and what that needs."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        asked = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if asked not in found:
            waiting += _needs_of(requirement)
        found.add(asked)
    return {name for name, _ in found}


def _needs_of(requirement: Requirement) -> Iterator[Requirement]:
    try:
        listed = requires(requirement.name) or []
    except PackageNotFoundError:  # of another platform
        return
    for needed in map(Requirement, listed):
        if needed.marker is None or any(needed.marker.evaluate({"extra": one}) for one in ("", *requirement.extras)):
            yield needed
