"""What the views reach for: settings, the config snapshot, the farm client and the view of the live workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from flask import current_app

from common.settings import WebSettings
from config_db.spec import ModelSpec
from tasks.client import FarmClient
from webapp.fleet import Fleet

_EXTENSION: Final = "farmhand"


class Served(Protocol):
    """One snapshot of what is served (``config_db.snapshot.Snapshot``)."""

    @property
    def epoch(self) -> int:
        """The epoch it was read at."""

    @property
    def models(self) -> Mapping[str, ModelSpec]:
        """All models by id."""

    def model(self, model_id: str) -> ModelSpec:
        """One model; ModelNotFoundError with the nearest ids."""


class Snapshots(Protocol):
    """Where the current snapshot is (``config_db.snapshot.SnapshotReader``)."""

    @property
    def current(self) -> Any:
        """The newest snapshot this process has read."""

    @property
    def is_connected(self) -> bool:
        """Whether the last poll reached the config DB."""


@dataclass(frozen=True, slots=True)
class Farm:
    """One per application."""

    settings: WebSettings
    snapshots: Snapshots
    client: FarmClient
    fleet: Fleet

    @property
    def served(self) -> Served:
        """What is served now."""
        return cast("Served", self.snapshots.current)


def install(extensions: dict[str, Any], farm: Farm) -> None:
    """Make ``farm()`` answer within the application that owns these extensions."""
    extensions[_EXTENSION] = farm


def farm() -> Farm:
    """The farm of the application that serves this request."""
    return cast("Farm", current_app.extensions[_EXTENSION])
