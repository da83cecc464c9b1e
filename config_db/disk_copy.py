"""A copy of the last snapshot on disk, so that a process can start while PostgreSQL is away.

Readable by its owner alone: it holds the hashes of API keys. It is read as rows are, so that another release's copy
serves, too; what cannot be read is left out and named in the log.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import MappingProxyType
from typing import Any
from uuid import UUID

import msgspec

from common.logs import get_logger
from config_db.newer_rows import FIELDS, UNREADABLE, read_spec
from config_db.schema import Kind
from config_db.snapshot import Snapshot

log = get_logger("config_db")


class _Copy(msgspec.Struct):
    """The form on disk. Models name themselves; everything else stands by name."""

    epoch: int
    epoch_id: UUID
    models: list[dict[str, Any]]
    pools: dict[str, dict[str, Any]] = {}
    tenants: dict[str, dict[str, Any]] = {}
    keys: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}


def write_copy(path: Path, snapshot: Snapshot) -> None:
    """Replace the copy in one step, so that who reads finds the old or the new one; a failure is only logged."""
    named = {field: dict(getattr(snapshot, field)) for kind, field in FIELDS.items() if kind != "model"}
    whole = msgspec.json.encode(
        {"epoch": snapshot.epoch, "epoch_id": snapshot.epoch_id, "models": list(snapshot.models.values()), **named}
        | {"origins": dict(snapshot.origins)}
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as beside:  # mode 0600
            try:
                beside.write(whole)
                beside.flush()
                Path(beside.name).replace(path)
            except OSError:
                Path(beside.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        log.warning("config_copy_failed", path=str(path), error=str(error))


def read_copy(path: Path) -> Snapshot | None:
    """The snapshot on disk; None if there is none, or none that can be read, which is logged."""
    try:
        copy = msgspec.json.decode(path.read_bytes(), type=_Copy)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, ValueError, RecursionError) as error:
        log.warning("config_copy_unreadable", path=str(path), error=str(error))
        return None
    models = {str(content.get("id")): content for content in copy.models}
    contents = {field: models if kind == "model" else getattr(copy, field) for kind, field in FIELDS.items()}
    read = {field: _read(kind, contents[field]) for kind, field in FIELDS.items()}
    return Snapshot(copy.epoch, copy.epoch_id, **read, origins=MappingProxyType(copy.origins))


def _read(kind: Kind, contents: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    read = {}
    for name, content in contents.items():
        try:
            read[name] = read_spec(kind, name, content)
        except UNREADABLE as error:
            log.warning("copied_row_unreadable", kind=kind, row=name, error=str(error))
    return MappingProxyType(read)
