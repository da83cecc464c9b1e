"""The catalogue: models as YAML files or local directories, and how they become rows of the config DB."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from common.errors import SetupError
from config_db.epochs import advance_epoch, lock_epoch, remember
from config_db.schema import ModelRow
from config_db.spec import ModelSpec, Source

TOMBSTONE_KEPT: Final = timedelta(days=30)
KIND: Final = "model"


def read_catalog(directory: Path) -> list[ModelSpec]:
    """Every model of a directory of YAML files: each file is one model, or ``models:`` a list of them.

    Raises:
        SetupError: a file cannot be read as such; names the file and the field.
    """
    if not directory.is_dir():
        raise SetupError(f"there is no catalogue directory {directory}")
    found: dict[str, Path] = {}
    specs: list[ModelSpec] = []
    for path in sorted((*directory.glob("*.yaml"), *directory.glob("*.yml"))):
        for spec in _read_file(path):
            if spec.id in found:
                raise SetupError(f"{path.name}: model {spec.id} stands in {found[spec.id].name}, too")
            found[spec.id] = path
            specs.append(spec)
    return specs


def apply_models(
    session: Session,
    specs: Iterable[ModelSpec],
    *,
    actor: str,
    reason: str,
    prune: bool = False,
    expected: int | None = None,
) -> int:
    """Make the table say what ``specs`` say and return the epoch, which rises only if something changed.

    Args:
        session: the caller's; the caller commits.
        specs: models to add or replace.
        actor: who changes it, for the history.
        reason: why, for the history.
        prune: also delete the models that ``specs`` do not name.
        expected: the epoch the caller has read.

    Raises:
        EpochConflictError: something else was published since.
    """
    current = lock_epoch(session)
    rows = {row.id: row for row in session.scalars(select(ModelRow))}
    wanted = {spec.id: msgspec.to_builtins(spec) for spec in specs}
    changed = {name: spec for name, spec in wanted.items() if _is_news(rows.get(name), spec)}
    gone = [name for name, row in rows.items() if prune and name not in wanted and row.deleted_at is None]
    if not changed and not gone and (expected is None or expected == current):
        return current
    epoch = advance_epoch(session, actor=actor, reason=reason, expected=expected)
    for name, spec in changed.items():
        row = rows.get(name)
        before = row.spec if row is not None and row.deleted_at is None else None
        remember(session, epoch=epoch, kind=KIND, name=name, before=before, after=spec)
        session.merge(ModelRow(id=name, spec=spec, epoch=epoch, deleted_at=None))
    for name in gone:
        row = rows[name]
        remember(session, epoch=epoch, kind=KIND, name=name, before=row.spec, after=None)
        row.deleted_at, row.epoch = datetime.now(UTC), epoch
    session.execute(delete(ModelRow).where(ModelRow.deleted_at < datetime.now(UTC) - TOMBSTONE_KEPT))
    session.flush()
    return epoch


def spec_of_directory(path: Path, *, model_id: str | None = None) -> ModelSpec:
    """The spec of a local directory that holds a sentence-transformers model or a plain transformers encoder.

    Raises:
        SetupError: the directory holds no such model.
    """
    config = _read_json(path / "config.json")
    if config is None:
        raise SetupError(f"{path} is no model directory: it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise SetupError(f"{path} holds no safetensors weights; other formats can run code and are not loaded")
    width = config.get("hidden_size") or config.get("d_model") or config.get("dim")
    if not isinstance(width, int):
        raise SetupError(f"{path / 'config.json'} names no hidden size: only text encoders are found by directory")
    try:
        return msgspec.convert(
            {
                "id": model_id or path.resolve().name,
                "family": "dense",
                "source": msgspec.to_builtins(Source(path=str(path.resolve()))),
                "dims": {"dense": width},
            },
            ModelSpec,
        )
    except msgspec.ValidationError as error:
        raise SetupError(f"{path}: {error}") from error


def _is_news(row: ModelRow | None, spec: Mapping[str, Any]) -> bool:
    return row is None or row.deleted_at is not None or row.spec != spec


def _read_file(path: Path) -> list[ModelSpec]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    entries = content["models"] if isinstance(content, dict) and set(content) == {"models"} else [content]
    try:
        return msgspec.convert(entries, list[ModelSpec])
    except msgspec.ValidationError as error:
        raise SetupError(f"{path.name}: {error}") from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SetupError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else None
