"""The house keeps its own rules, and its documents say what the code says."""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from pydantic import ByteSize, SecretStr, TypeAdapter
from pydantic.fields import FieldInfo

from common.settings import CommonSettings, WebSettings, WorkerSettings, load_settings
from tasks.names import TASK_NAMES
from webapp.app import bare_app
from webapp.openapi.document import document_text
from workers.app import build_worker_app

ROOT = Path(__file__).parents[2]
UNTRACKED = {"build", "dist", "node_modules"}
DOCUMENTS = (*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md")
VARIABLE = re.compile(r"(?<![A-Z_])FARMHAND_[A-Z][A-Z_]*[A-Z]")


@cache
def tree() -> dict[str, str]:
    """Every text file that belongs to the project, by its path."""
    found = {}
    for path in walk(ROOT):
        try:
            found[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    return found


def walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        is_made = path.name in UNTRACKED or path.name.endswith((".egg-info", "cache", "__")) or path.is_symlink()
        is_hidden = path.name.startswith(".") and path.name != ".ci"
        if path.is_dir() and not is_hidden and not is_made and path != ROOT / "bench" / "out":
            yield from walk(path)
        elif path.is_file() and not path.is_symlink() and path.name != ".git":  # which it is in a worktree
            yield path


def fields(kind: type[CommonSettings]) -> dict[str, FieldInfo]:
    """The settings of a class that are its own, by the variable they are read from."""
    inherited = CommonSettings.model_fields if kind is not CommonSettings else {}
    return {
        f"FARMHAND_{name.upper()}": field
        for name, field in kind.model_fields.items()
        if name not in inherited and field.validation_alias is None
    }


KNOWN = {**fields(CommonSettings), **fields(WebSettings), **fields(WorkerSettings)}


def documented() -> dict[str, tuple[str, str]]:
    """Default and meaning of each variable in the tables of docs/settings.md."""
    rows = re.findall(r"^\| `(FARMHAND_\w+)` \| (.+?) \| (.+) \|$", (ROOT / "docs/settings.md").read_text(), re.M)
    assert len(rows) == len({name for name, _, _ in rows})
    return {name: (default, meaning) for name, default, meaning in rows}


def test_every_setting_is_documented_and_nothing_else_is() -> None:
    assert documented().keys() == KNOWN.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_a_documented_default_is_the_default(name: str) -> None:
    default = KNOWN[name].default
    said = documented()[name][0].strip("`")
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default is None:
        assert said == "unset"
    elif default == "":
        assert said == "empty"
    elif isinstance(default, ByteSize):
        assert TypeAdapter(ByteSize).validate_python(said) == default
    else:
        assert said == (str(default).lower() if isinstance(default, bool) else str(default))


def test_every_variable_named_anywhere_is_a_setting() -> None:
    places = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
    places += [path for path in tree() if path.startswith(("deploy/", "bench/", "cli/", ".ci/")) or path == "Makefile"]
    unknown = {(place, name) for place in places for name in VARIABLE.findall(tree()[place]) if name not in KNOWN}
    assert not unknown


def test_the_rooms_import_one_way() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_task_name_has_a_body() -> None:
    app = build_worker_app(load_settings(WorkerSettings))
    assert set(TASK_NAMES.values()) <= set(app.tasks)


def test_the_document_of_the_api_is_that_of_the_code() -> None:
    """Also where a view has no declaration: the error names it, and where declarations are explained."""
    is_current = tree()["docs/openapi.json"] == document_text(bare_app())
    assert is_current, "run `make openapi`, or python -m webapp.openapi docs/openapi.json"


def test_every_script_is_used() -> None:
    code = "\n".join(text for path, text in tree().items() if path.startswith(("tasks/", "workers/")))
    scripts = [path.stem for path in (ROOT / "tasks/scripts").glob("*.lua")]
    assert scripts
    assert [name for name in scripts if f'"{name}"' not in code] == []


def test_no_script_calls_what_corrupts_redis() -> None:
    """INCRBYFLOAT, called from a script, ends Redis 6.2 with a segmentation fault sooner or later."""
    scripts = {path: text for path, text in tree().items() if path.endswith(".lua")}
    assert scripts
    assert [path for path, text in scripts.items() if re.search(r"call\('[HZ]?INCRBYFLOAT", text, re.I)] == []


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?<![\w.}*])/(?:work|root)/",
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|artifactory|/simple/?\b(?=\s|\"|')",
        r"\b[Ii]ssue #?\d+\b",
        r"(?i)\b(?:anthro" + r"pic|clau" + r"de|chat" + r"gpt|co" + r"pilot)\b",
    ],
    ids=["a machine's paths", "a package registry's host", "a tracker's numbers", "a writing tool"],
)
def test_no_file_names(pattern: str) -> None:
    """What is private to the place where a file was written has no meaning to who reads it."""
    own = str(Path(__file__).relative_to(ROOT))
    found = {
        path: match.group(0) for path, text in tree().items() if path != own and (match := re.search(pattern, text))
    }
    assert not found


def test_every_page_named_in_capitals_is_in_the_tree() -> None:
    pages = {Path(path).name for path in tree()}
    named = {(path, name) for path, text in tree().items() for name in re.findall(r"\b[A-Z]{4,}\.md\b", text)}
    assert not {(path, name) for path, name in named if name not in pages}


def test_every_link_of_a_document_leads_somewhere() -> None:
    pages = [path for path in tree() if path.endswith(".md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", tree()[page])]
    assert [(page, link) for page, link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_make_target_in_the_readme_exists() -> None:
    readme, makefile = tree()["README.md"], tree()["Makefile"]
    asked = set(re.findall(r"(?:^|`)make ([a-z]+)", readme, re.M))
    assert asked
    assert asked <= set(re.findall(r"^([a-z]+):", makefile, re.M))


def test_the_architecture_names_only_tests_and_files_that_exist() -> None:
    page = tree()["docs/architecture.md"]
    tests = {name for text in tree().values() for name in re.findall(r"^def (test_\w+)", text, re.M)}
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", page))
    assert named
    assert named <= tests
    files = set(re.findall(r"`([\w/.-]+\.(?:py|lua|yaml|md))`", page))
    assert [path for path in files if path not in tree()] == []
