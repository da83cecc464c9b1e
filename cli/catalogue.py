"""Which models a farm of one machine starts with: the catalogue's files, directories given by hand, the demo model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from cli.demo import DEMO_MODEL, demo_directory
from common.errors import SetupError
from config_db.catalog import apply_models, spec_of_directory
from config_db.engine import open_engine, ping, transaction
from config_db.schema import ModelRow
from config_db.spec import ModelSpec

ACTOR: Final = "farmhand"


def demo_spec() -> ModelSpec:
    """The demo model as a local directory, loaded before the first request."""
    return msgspec.structs.replace(spec_of_directory(demo_directory(), model_id=DEMO_MODEL), preload=True)


def specs_of_directories(directories: Sequence[Path]) -> list[ModelSpec]:
    """One model a directory, under the directory's name; SetupError if two bear the same."""
    specs = [spec_of_directory(directory) for directory in directories]
    seen: dict[str, Path] = {}
    for spec, directory in zip(specs, directories, strict=True):
        if spec.id in seen:
            raise SetupError(f"{directory} and {seen[spec.id]} would both be served as {spec.id!r}: rename one")
        seen[spec.id] = directory
    return specs


def publish(database_url: str, specs: Sequence[ModelSpec], *, reason: str, prune: bool = False) -> int:
    """Make the config DB say so, and return its epoch."""
    engine = open_engine(database_url)
    try:
        with transaction(engine) as session:
            return apply_models(session, specs, actor=ACTOR, reason=reason, prune=prune)
    finally:
        engine.dispose()


def published(database_url: str) -> list[ModelSpec]:
    """The models the config DB serves, by id; SetupError if it does not answer."""
    engine = open_engine(database_url)
    try:
        ping(engine)
        with Session(engine) as session:
            rows = session.scalars(select(ModelRow).where(ModelRow.deleted_at.is_(None)).order_by(ModelRow.id))
            return [msgspec.convert(row.spec, ModelSpec) for row in rows]
    finally:
        engine.dispose()
