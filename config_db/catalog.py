"""The catalogue: models as YAML files or local directories, and how they become rows of the config DB."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from common.errors import SetupError
from config_db.epochs import advance_epoch, lock_epoch, remember
from config_db.schema import TOMBSTONE_KEPT, ModelRow
from config_db.spec import ModelSpec, Source

KIND: Final = "model"
_UNBOUNDED: Final = 1_000_000
"""Tokenizers that know no limit name a huge one."""


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
    wanted = {spec.id: as_json(spec) for spec in specs}
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
        row.deleted_at, row.epoch = func.now(), epoch
    session.flush()
    session.execute(delete(ModelRow).where(ModelRow.deleted_at < func.now() - TOMBSTONE_KEPT))
    return epoch


def as_json(spec: ModelSpec) -> dict[str, Any]:
    """A spec as it stands in its row: only what JSON knows, so that what is read back equals what was written."""
    content: dict[str, Any] = json.loads(msgspec.json.encode(spec))
    return content


def spec_of_directory(path: Path, *, model_id: str | None = None) -> ModelSpec:
    """The spec of a local directory that holds a sentence-transformers model or a plain transformers encoder.

    Width and length are what the files say; what they leave open stays open.

    Raises:
        SetupError: the directory holds no such model.
    """
    if not path.is_dir():
        raise SetupError(f"there is no model directory {path}")
    modules = _modules(path)
    encoder = next((folder for kind, folder in modules if kind == "Transformer"), path)
    width = _width(encoder, [folder for kind, folder in modules if kind == "Dense"])
    try:
        return msgspec.convert(
            {
                "id": model_id or path.resolve().name,
                "family": "dense",
                "source": msgspec.to_builtins(Source(path=str(path.resolve()))),
                "dims": {"dense": width},
                "max_length": _longest(encoder),
            },
            ModelSpec,
        )
    except msgspec.ValidationError as error:
        raise SetupError(f"{path}: {_field(error)}") from error


def _modules(path: Path) -> list[tuple[str, Path]]:
    """Kind and folder of each module of a sentence-transformers model, in order; none for a plain encoder."""
    entries = _read_json(path / "modules.json")
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SetupError(f"{path / 'modules.json'} is not a list of modules")
    return [(str(entry.get("type")).rpartition(".")[2], path / str(entry.get("path", ""))) for entry in entries]


def _width(encoder: Path, layers: list[Path]) -> int:
    """Numbers in one vector: of the last linear layer after the pooling, else of the encoder itself."""
    config = _read_json(encoder / "config.json")
    if not isinstance(config, dict):
        raise SetupError(f"{encoder} is no model directory: it has no config.json")
    if not any(encoder.glob("*.safetensors")):
        raise SetupError(f"{encoder} holds no safetensors weights; other formats can run code and are not loaded")
    if layers:
        last = _read_json(layers[-1] / "config.json")
        width = last.get("out_features") if isinstance(last, dict) else None
    else:
        width = config.get("hidden_size") or config.get("d_model") or config.get("dim")
    if not isinstance(width, int):
        where = (layers[-1] if layers else encoder) / "config.json"
        raise SetupError(f"{where} names no width of the vectors: only text encoders are found by directory")
    return width


def _longest(encoder: Path) -> int | None:
    """Tokens a text may have, as the model's authors set it."""
    own, tokenizer = (_read_json(encoder / name) for name in ("sentence_bert_config.json", "tokenizer_config.json"))
    longest = own.get("max_seq_length") if isinstance(own, dict) else None
    if longest is None and isinstance(tokenizer, dict):
        longest = tokenizer.get("model_max_length")
    return longest if isinstance(longest, int) and 0 < longest < _UNBOUNDED else None


def _is_news(row: ModelRow | None, spec: Mapping[str, Any]) -> bool:
    return row is None or row.deleted_at is not None or row.spec != spec


def _read_file(path: Path) -> list[ModelSpec]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise SetupError(f"{path.name} is not YAML that can be read: {' '.join(str(error).split())}") from error
    is_list = isinstance(content, dict) and set(content) == {"models"}
    try:
        return msgspec.convert(content["models"], list[ModelSpec]) if is_list else [msgspec.convert(content, ModelSpec)]
    except msgspec.ValidationError as error:
        raise SetupError(f"{path.name}: {_field(error, root='models' if is_list else '')}") from error


def _field(error: msgspec.ValidationError, *, root: str = "") -> str:
    """What is wrong, behind the path of the field as a reader of the file would write it."""
    what, _, where = str(error).partition(" - at ")
    found = re.fullmatch(r"(`key` in )?`\$(.*)`", where)
    field = f"{root}{found[2]}".lstrip(".") if found else root
    return f"{field}: {what}" if field else what


def _read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SetupError(f"{path} is not JSON that can be read: {error}") from error
