"""Brings files from any remote to this machine: room is made, they are fetched, verified and published.

Where they come from was decided by ``resolve``; how bytes come is for ``parts``, where they lie for ``store``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import ModelLoadError
from common.logs import get_logger
from workers.weights.failures import DamagedError, failure
from workers.weights.leases import Files
from workers.weights.manifest import Manifest, RemoteFile
from workers.weights.parts import Fetch, OnProgress, Remote
from workers.weights.setup import WeightsSetup
from workers.weights.store import Store

log = get_logger("host")


@dataclass(slots=True)
class Search:
    """One search: until when, what was tried so far, and whether the bucket is owed what is found."""

    deadline: float
    on_progress: OnProgress | None
    tiers: list[str]
    owed: bool = False

    def note(self, tier: str) -> None:
        """Another tier is tried; said again with a reason, that takes the place of what was said."""
        if self.tiers[-1].partition(" (")[0] == tier.partition(" (")[0]:
            self.tiers.pop()
        self.tiers.append(tier)


@dataclass(frozen=True, slots=True)
class Target:
    """Where files are to lie, how a person names them, and under which name the fetch is held."""

    place: str
    source: str
    owner: str


class Bringer:
    """Brings files into one store."""

    def __init__(self, store: Store, setup: WeightsSetup) -> None:
        self._store = store
        self._setup = setup

    def bring_or_refuse(self, target: Target, remote: Remote, files: Sequence[RemoteFile], search: Search) -> Files:
        """Bring the files; what came damaged is fetched once more.

        Raises:
            ModelLoadError: they cannot be had, or come damaged again.
        """
        try:
            return self.bring(target, remote, files, search)
        except DamagedError as error:
            log.warning("weights_damaged_on_the_way", source=target.source, error=str(error))
        try:
            return self.bring(target, remote, files, search)
        except DamagedError as error:
            raise failure(
                f"{remote.name} gave {error}, twice", "NETWORK", permanent=False, remedy="see what stands in between"
            ) from error

    def bring(self, target: Target, remote: Remote, files: Sequence[RemoteFile], search: Search) -> Files:
        """Fetch, verify and publish. What did not fit, or came damaged, is not kept; what merely broke off is.

        Raises:
            DamagedError: what came is not what was promised.
            ModelLoadError: they cannot be had.
        """
        fetch = Fetch(
            remote,
            files,
            self._store.partial(target.place, owner=target.owner),
            deadline=search.deadline,
            part_bytes=self._setup.part_bytes,
            connections=self._setup.connections,
            on_progress=search.on_progress,
        )
        try:
            with self._store.making_room(fetch.missing_bytes):
                fetch.claim()
            verified = fetch.run()
        except (DamagedError, OSError):
            self._store.clear_partial(target.place)
            raise
        except ModelLoadError as error:
            if error.details["error_class"] == "STORAGE":
                self._store.clear_partial(target.place)
            raise
        manifest = Manifest(source=target.source, files=tuple(verified))
        self._store.publish(target.place, manifest, owed=search.owed)
        log.info("weights_fetched", source=target.source, tier=remote.name, bytes=manifest.bytes)
        published = self._store.find(target.place)
        if published is None:
            raise failure(f"{target.source} was removed as soon as it was here", "STORAGE", permanent=False)
        return published
