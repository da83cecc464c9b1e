"""The catalogue: models as a directory of YAML files, and how they become rows of the config DB."""

from collections.abc import Collection, Iterable
from pathlib import Path

from sqlalchemy.orm import Session

from common.errors import SetupError
from config_db.config_files import read_files
from config_db.publish import Delete, Put, live, publish
from config_db.schema import Origin
from config_db.spec import ModelSpec, plain


def read_catalog(directory: Path, *, families: Collection[str] = ()) -> list[ModelSpec]:
    """Every model of a directory of YAML files and of the directories in it, in the order of their paths.

    What else the files hold (``config_db.config_files``) is checked and left out.

    Raises:
        SetupError: a file cannot be read as such; names the file and the field.
    """
    found = read_files(directory, families=families)
    if found.faults:
        raise SetupError(str(found.faults[0]))
    return found.specs


def apply_models(
    session: Session,
    specs: Iterable[ModelSpec],
    *,
    actor: str,
    reason: str,
    prune: bool = False,
    expected: int | None = None,
    origin: Origin = "filesystem",
) -> int:
    """Make the table say what ``specs`` say and return the epoch, which rises only if something changed.

    Args:
        session: the caller's; the caller commits.
        specs: models to add or replace.
        actor: who changes it, for the history.
        reason: why, for the history.
        prune: also delete the models that ``specs`` do not name.
        expected: the epoch the caller has read.
        origin: how the models came here.

    Raises:
        EpochConflictError: something else was published since.
        ConfigError: two models would share a name.
    """
    puts: list[Put | Delete] = [Put("model", spec.id, plain(spec), origin) for spec in specs]
    named = {put.name for put in puts}
    gone = [Delete("model", name) for name in live(session, "model") if name not in named] if prune else []
    return publish(session, [*puts, *gone], actor=actor, reason=reason, expected=expected).epoch
