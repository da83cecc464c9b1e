"""Which models a farm of one machine starts with: the catalogue's files, directories given by hand, the demo model."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cli.database import reading, writing
from cli.demo import DEMO_MODEL, demo_directory
from common.errors import ModelNotFoundError, SetupError
from config_db.catalog import apply_models
from config_db.epochs import lock_epoch
from config_db.history import last_changed_by_others
from config_db.model_folders import spec_of_directory
from config_db.publish import live
from config_db.rows import read_rows
from config_db.spec import ModelSpec, Placement

ACTOR: Final = "farmhand up"
"""No user of a machine is called so: what people change is not taken for the farm's own doing."""


def demo_spec() -> ModelSpec:
    """The demo model as a local directory, loaded before the first request."""
    return msgspec.structs.replace(
        spec_of_directory(demo_directory(), model_id=DEMO_MODEL), placement=Placement(preload=True)
    )


def specs_of_directories(directories: Sequence[Path]) -> list[ModelSpec]:
    """One model a directory, under the directory's name; SetupError if two bear the same."""
    specs = [spec_of_directory(directory) for directory in directories]
    seen: dict[str, Path] = {}
    for spec, directory in zip(specs, directories, strict=True):
        if spec.id in seen:
            raise SetupError(f"{directory} and {seen[spec.id]} would both be served as {spec.id!r}: rename one")
        seen[spec.id] = directory
    return specs


def offer(database_url: str, specs: Sequence[ModelSpec], *, reason: str) -> int:
    """Publish the models a farm starts with, and return the epoch.

    What somebody else has changed or deleted since is left as it is: a restart undoes nobody's work.
    """
    with writing(database_url) as session:
        lock_epoch(session)
        others = last_changed_by_others(session, "model", ACTOR)
        return apply_models(session, [spec for spec in specs if spec.id not in others], actor=ACTOR, reason=reason)


def published(database_url: str) -> list[ModelSpec]:
    """The models the config DB serves, by id; SetupError if it does not answer."""
    with reading(database_url) as session:
        return list(read_rows(ModelSpec, live(session, "model")).values())


def find(database_url: str, name: str) -> ModelSpec:
    """The model of this id or alias.

    Raises:
        ModelNotFoundError: there is none; names the nearest.
    """
    specs = {spec.id: spec for spec in published(database_url)}
    names = {alias: spec.id for spec in specs.values() for alias in spec.aliases} | {one: one for one in specs}
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 3, 0.6)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        raise ModelNotFoundError(f"there is no model {name!r}{hint}", param="model", details={"nearest": nearest})
    return specs[names[name]]
