"""The config DB as a folder of YAML files: what ``farmhand config apply`` reads back. Never keys."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy.orm import Session

from common.errors import SetupError
from config_db.access import PoolSpec, TenantSpec
from config_db.config_files import SECTIONS, STAMPED, read_files
from config_db.export import file_paths, model_yaml, ordered, to_yaml
from config_db.json_schema import schema_text
from config_db.owners import belongs_in_files
from config_db.publish import live
from config_db.rows import newer_fields, read_row_as
from config_db.schema import Kind
from config_db.spec import ModelSpec

T = TypeVar("T", bound=msgspec.Struct)

SCHEMA_FILE: Final = "model.schema.json"
_KINDS: Final[Mapping[Kind, type[msgspec.Struct]]] = {"model": ModelSpec, "pool": PoolSpec, "tenant": TenantSpec}


def render(session: Session, *, with_schema: bool = False) -> dict[PurePosixPath, str]:
    """The text of every file by its path in the folder: one a model, one for each other kind that has rows.

    Args:
        session: of a transaction in which every statement sees the same (REPEATABLE READ).
        with_schema: add the JSON Schema of models, and to each model the line by which editors find it.

    Raises:
        SetupError: a row holds what this release cannot write.
    """
    specs = {name: _read(ModelSpec, "model", name, content) for name, content in _rows(session, "model")}
    paths = file_paths(specs.values())
    files = {}
    for name, spec in specs.items():
        up = "../" * (len(paths[name].parts) - 1)
        files[paths[name]] = model_yaml(spec, schema=f"{up}{SCHEMA_FILE}" if with_schema else None)
    if with_schema:
        files[PurePosixPath(SCHEMA_FILE)] = schema_text()
    for section, kind in SECTIONS.items():
        parts = {} if kind == "model" else {name: _part(kind, name, row) for name, row in _rows(session, kind)}
        if parts:
            files[PurePosixPath(f"{section}.yaml")] = to_yaml({section: parts})
    return files


def check_free(directory: Path, *, force: bool, families: Collection[str]) -> list[Path]:
    """The YAML files that stand there already, which an export replaces.

    Raises:
        SetupError: the directory is not empty, and ``force`` does not say that this is meant; or with ``force`` some
            of its YAML files are no config: they are somebody else's.
    """
    if not directory.exists():
        return []
    if not force:
        if any(not path.name.startswith(".") for path in directory.iterdir()):
            raise SetupError(f"{directory} is not empty: choose another, or replace the config it holds with --force")
        return []
    found = read_files(directory, families=families)
    if found.faults:
        raise SetupError(f"{directory} holds YAML that is no config, and nothing is replaced: {found.faults[0]}")
    return found.files


def write(directory: Path, files: Mapping[PurePosixPath, str], *, replaced: list[Path]) -> None:
    """Write the files, each in one step, and remove of ``replaced`` those that are no more."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    for path in replaced:
        if PurePosixPath(path.relative_to(directory).as_posix()) not in files:
            path.unlink()


def _rows(session: Session, kind: Kind) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that files can hold, by name; SetupError at one that this release cannot read in full."""
    for name, content in sorted(live(session, kind).items()):
        if not belongs_in_files(kind, content):
            continue
        newer = newer_fields(_KINDS[kind], content) if kind in _KINDS else []
        if newer:
            what = f"{kind} {name} was written by a newer release, whose {', '.join(newer)} is not known here"
            raise SetupError(f"{what}: export with that one")
        yield name, content


def _read(shape: type[T], kind: Kind, name: str, content: Mapping[str, Any]) -> T:
    """One row as a spec; SetupError if it is none to this release."""
    try:
        return read_row_as(shape, name, content)
    except msgspec.ValidationError as error:
        what = f"{kind} {name} was written in a way that this release cannot read"
        raise SetupError(f"{what}: {error}; write it anew, or delete it") from error


def _part(kind: Kind, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """One row as it stands in a section."""
    part: dict[str, Any] = ordered(_read(_KINDS[kind], kind, name, content) if kind in _KINDS else content)
    if kind == "pool":
        part.pop(STAMPED, None)
    return part
