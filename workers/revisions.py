"""Which spec of a model serves: a new one takes over when it is resident; until then, and if it never is, the former.

Pure: no I/O, no clock of its own. ``dispatch`` asks and loads; one thread owns it. A spec that was never resident here
has no former: a model's first spec, and the repair of one that never loaded, are simply served.
"""

from collections.abc import Container, Mapping
from typing import Final

from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec

TRY_AGAIN_S: Final = 5.0
"""So long after one attempt to load a new spec comes the next."""
ROOM_TRIES: Final = 3
"""A new spec for which so often there was no room beside the former takes its place: it is loaded as any model is."""


class Revisions:
    """The serving spec of each model that has been resident, and the specs that are to take over."""

    def __init__(self) -> None:
        self._serving: dict[str, ModelSpec] = {}
        self._wanted: dict[str, ModelSpec] = {}
        self._asked_for: set[str] = set()
        self._tried_at: dict[str, float] = {}
        self._no_room: dict[str, int] = {}
        self._leaving: dict[str, str] = {}

    def spec(self, digest: str) -> ModelSpec | None:
        """A serving spec by its digest, however old."""
        return next((spec for spec in self._serving.values() if spec.digest == digest), None)

    def serving(self, asked: ModelSpec) -> ModelSpec:
        """The spec that answers a request admitted against ``asked``."""
        serving = self._serving.get(asked.id)
        if serving is None or serving.digest == asked.digest:
            return asked
        self._asked_for.add(asked.id)
        return serving

    def read(self, snapshot: Snapshot) -> None:
        """Note what a new epoch wants of models that serve: another spec, or to be gone."""
        current = _by_id(snapshot, self._serving)
        for model, serving in list(self._serving.items()):
            wanted = current.get(model)
            if wanted is None:
                self._leave(self._serving.pop(model), "removed")
                self._forget(model)
            elif wanted.digest == serving.digest:
                self._serving[model] = wanted
                self._forget(model)
            elif model not in self._wanted or self._wanted[model].digest != wanted.digest:
                self._forget(model)
                self._wanted[model] = wanted

    def due(self, now: float, resident: Container[str]) -> list[ModelSpec]:
        """New specs that are to be loaded now: those whose former is resident, or whose model is asked for."""
        due = [
            spec
            for model, spec in self._wanted.items()
            if now >= self._tried_at.get(spec.digest, 0.0) + TRY_AGAIN_S
            and (model in self._asked_for or self._serving[model].digest in resident)
        ]
        self._tried_at |= {spec.digest: now for spec in due}
        return due

    def on_loaded(self, spec: ModelSpec) -> None:
        """A spec is resident on some host: it serves, unless it was replaced meanwhile."""
        former = self._serving.get(spec.id)
        self._leaving.pop(spec.digest, None)
        if former is None:
            self._serving[spec.id] = spec
        elif former.digest != spec.digest and self._is_wanted(spec):
            self._serving[spec.id] = spec
            self._forget(spec.id)
            self._leave(former, "replaced")

    def on_no_room(self, digest: str) -> None:
        """A new spec could not be loaded beside what is there."""
        wanted = next((spec for spec in self._wanted.values() if spec.digest == digest), None)
        if wanted is None:
            return
        self._no_room[digest] = self._no_room.get(digest, 0) + 1
        if self._no_room[digest] >= ROOM_TRIES:
            self._leave(self._serving.pop(wanted.id), "replaced")
            self._forget(wanted.id)

    def leaving(self) -> Mapping[str, str]:
        """Digests that serve no more, and why: to be evicted once nothing waits for them."""
        return self._leaving

    def gone(self, digest: str) -> None:
        """It has been evicted."""
        self._leaving.pop(digest, None)

    def _is_wanted(self, spec: ModelSpec) -> bool:
        wanted = self._wanted.get(spec.id)
        return wanted is not None and wanted.digest == spec.digest

    def _leave(self, spec: ModelSpec, reason: str) -> None:
        if all(other.digest != spec.digest for other in self._serving.values()):
            self._leaving[spec.digest] = reason

    def _forget(self, model: str) -> None:
        self._asked_for.discard(model)
        wanted = self._wanted.pop(model, None)
        if wanted is not None:
            self._tried_at.pop(wanted.digest, None)
            self._no_room.pop(wanted.digest, None)


def _by_id(snapshot: Snapshot, ids: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
    """The present specs of these ids; those of profiles stand in their models."""
    found: dict[str, ModelSpec] = {}
    for name in ids:
        model = snapshot.models.get(name.partition(":")[0])
        for spec in (model, *model.profile_specs) if model is not None else ():
            if spec.id == name:
                found[name] = spec
    return found
