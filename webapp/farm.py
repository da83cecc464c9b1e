"""What the views reach for: settings, the config snapshot, the farm client and the view of the live workers."""

from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

from flask import Flask, current_app

from common.settings import WebSettings
from config_db.snapshot import Snapshot
from tasks.client import FarmClient
from webapp.cluster import Cluster
from webapp.fleet import Fleet
from webapp.watchers import Watchers

_EXTENSION: Final = "farmhand"


class Snapshots(Protocol):
    """Where the current snapshot is (``config_db.reader.SnapshotReader``)."""

    @property
    def current(self) -> Snapshot:
        """The newest snapshot this process has read."""

    @property
    def is_connected(self) -> bool:
        """Whether the last poll reached the config DB."""

    def poll_soon(self) -> None:
        """Look for a newer one at once."""


@dataclass(frozen=True, slots=True)
class Farm:
    """One per application."""

    settings: WebSettings
    snapshots: Snapshots
    client: FarmClient
    fleet: Fleet
    cluster: Cluster
    watchers: Watchers

    @property
    def served(self) -> Snapshot:
        """What is served now."""
        return self.snapshots.current


def install(extensions: dict[str, Any], farm: Farm) -> None:
    """Make ``farm()`` answer within the application that owns these extensions."""
    extensions[_EXTENSION] = farm


def farm_of(app: Flask) -> Farm:
    """The farm of an application."""
    return cast("Farm", app.extensions[_EXTENSION])


def farm() -> Farm:
    """The farm of the application that serves this request."""
    return farm_of(current_app)
