"""Loads models into the residency: one at a time, in a thread of its own, so that other models are served meanwhile.

Owns the families and the memory of failed loads. What it loads for a waiting micro-batch comes before hints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

from common.errors import CapacityError, FarmError, ModelLoadError, ResidencyFullError
from common.logs import get_logger
from config_db.spec import ModelSpec, Source, WeightsFormat
from workers.host import devices
from workers.host.families.protocol import Device, Family, Model
from workers.host.families.registry import find
from workers.host.frames import NO_ROOM, HostSetup
from workers.host.residency import Residency, Terms
from workers.weights.leases import Files
from workers.weights.manifest import SAFE

log = get_logger("host")

REMEMBER_PERMANENT_S: Final = 60.0
REMEMBER_PASSING_S: Final = 5.0
"""A failed load is answered from memory for so long, so that a broken model does not keep a host busy with trying."""
WAIT_FOR_LEASES_S: Final = 60.0
HINT_IDLE_S: Final = 2.0
"""A hinted load evicts only what was not used for so long."""

Tell = Callable[[str, str, dict[str, Any]], None]


@dataclass(slots=True)
class _Failure:
    error: FarmError
    until: float
    attempts: int


class Loader:
    """Brings models onto the device.

    Args:
        tell: called with a spec's digest, ``loading|loaded|load_failed|skipped`` and details.
    """

    def __init__(self, setup: HostSetup, device: Device, residency: Residency[Model], tell: Tell) -> None:
        self._setup = setup
        self._device = device
        self._residency = residency
        self._tell = tell
        self._families: dict[str, Family] = {}
        self._failures: dict[str, _Failure] = {}
        self._own_bytes: dict[str, int] = {}

    def lease(self, digest: str, spec: ModelSpec) -> tuple[Model, float]:
        """Hold the model, loading it first if it is absent; also the seconds that took.

        Raises:
            FarmError: it cannot be loaded, or there is no room for it.
        """
        model = self._residency.lease(digest)
        if model is not None:
            return model, 0.0
        self._raise_remembered(digest)
        try:
            load_s = self._load(digest, spec, wait_s=WAIT_FOR_LEASES_S, idle_s=0.0)
        except FarmError as error:
            self._tell(digest, "load_failed", {"error": error.as_dict()})
            raise
        model = self._residency.lease(digest)
        if model is None:
            raise ModelLoadError(f"{spec.id} was evicted as soon as it was loaded; try again", details=_why("UNKNOWN"))
        return model, load_s

    def explained_bytes(self) -> int:
        """Memory of this process that its resident models account for; mapped files are not counted."""
        resident = self._residency.resident()
        self._own_bytes = {digest: size for digest, size in self._own_bytes.items() if digest in resident}
        return sum(self._own_bytes.values())

    def preload(self, digest: str, spec: ModelSpec) -> None:
        """Load on a hint: only if there is room, or what is in the way lies idle. Failures are told, not raised."""
        if digest in self._residency.resident() or self._remembered(digest) is not None:
            self._tell(digest, "skipped", {})
            return
        try:
            self._load(digest, spec, wait_s=0.0, idle_s=HINT_IDLE_S)
        except CapacityError:
            self._tell(digest, "skipped", {"why": NO_ROOM})
        except FarmError as error:
            self._tell(digest, "load_failed", {"error": error.as_dict()})

    def _load(self, digest: str, spec: ModelSpec, *, wait_s: float, idle_s: float) -> float:
        """Load and admit; returns the seconds it took. FarmError, whatever goes wrong."""
        started = monotonic()
        self._tell(digest, "loading", {})
        try:
            family = self._family(spec.family)
            with (
                self.find(spec.source, spec.trust.formats) as files,
                self._residency.reserved(digest, family.estimate_bytes(spec, files.path), wait_s=wait_s, idle_s=idle_s),
            ):
                held_bytes = devices.held_bytes(self._device)
                model = self._load_files(family, spec, files.path)
                grown = devices.held_bytes(self._device) - held_bytes
                files.keep_for(model)
                size = self._residency.admit(digest, model, terms(spec), wait_s=wait_s)
                self._own_bytes[digest] = min(size, max(0, grown))
        except Exception as error:
            raise self._remember(digest, spec, error) from error
        self._failures.pop(digest, None)
        load_s = monotonic() - started
        self._tell(digest, "loaded", {"bytes": size, "load_s": round(load_s, 6)})
        return load_s

    def _load_files(self, family: Family, spec: ModelSpec, files: Path) -> Model:
        """Load; where memory runs out, once more with the device to itself."""
        try:
            return family.load(spec, files, self._device)
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
        self._residency.evict_idle()
        devices.clear_caches()
        return family.load(spec, files, self._device)

    def _family(self, name: str) -> Family:
        if name not in self._families:
            self._families[name] = find(name, self._setup.extra_families)
        return self._families[name]

    def find(self, source: Source, formats: tuple[WeightsFormat, ...] = SAFE) -> Files:
        """The files of a model or an adapter, brought onto this machine's disk if they are not there yet."""
        from workers.weights.resolve import resolve

        return resolve(source, self._setup.weights, formats=formats)

    def must_fetch(self, digest: str, spec: ModelSpec) -> bool:
        """Whether its files must come from elsewhere before it can be loaded; no, if that has just failed."""
        from workers.weights.resolve import is_here

        return (
            digest not in self._residency.resident()
            and self._remembered(digest) is None
            and not is_here(spec.source, self._setup.weights, formats=spec.trust.formats)
        )

    def bring(self, digest: str, spec: ModelSpec) -> None:
        """Fetch its files beside loads; a failure is remembered, and so told to who waits for it."""
        try:
            self.find(spec.source, spec.trust.formats).release()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the load answers
            self._remember(digest, spec, error)

    def _remembered(self, digest: str) -> FarmError | None:
        """How the last load failed, while that is not long ago."""
        failure = self._failures.get(digest)
        return failure.error if failure is not None and monotonic() < failure.until else None

    def _raise_remembered(self, digest: str) -> None:
        error = self._remembered(digest)
        if error is not None:
            raise error

    def _remember(self, digest: str, spec: ModelSpec, error: Exception) -> FarmError:
        """The error as callers see it, with its count of attempts; a want of room is not remembered."""
        if isinstance(error, ResidencyFullError):
            return error
        known = self._failures.get(digest)
        attempts = known.attempts + 1 if known else 1
        failed = load_error(spec, error, attempts)
        keep_s = REMEMBER_PERMANENT_S if failed.details.get("permanent") else REMEMBER_PASSING_S
        self._failures[digest] = _Failure(failed, monotonic() + keep_s, attempts)
        log.warning("model_load_failed", model=spec.id, attempts=attempts, error=failed.message)
        return failed


def terms(spec: ModelSpec) -> Terms:
    """How long the config lets a model stay."""
    placement = spec.placement
    return Terms(held=placement.pinned or placement.tier == "device", idle_unload_s=placement.idle_unload_s)


def load_error(spec: ModelSpec, error: Exception, attempts: int) -> ModelLoadError:
    """Whatever a load raised, as the one error callers know: its class, whether trying again helps, how often tried."""
    if isinstance(error, ModelLoadError):
        details = {**_why("UNKNOWN"), **error.details, "attempts": attempts}
        return ModelLoadError(error.message, param=error.param, details=details, retry_after_s=error.retry_after_s)
    if devices.is_out_of_memory(error):
        details = {**_why("OOM"), "attempts": attempts}
        return ModelLoadError(f"{spec.id} cannot be loaded: the device has not the memory for it", details=details)
    details = {**_why("ENGINE"), "attempts": attempts}
    return ModelLoadError(f"{spec.id} cannot be loaded: {type(error).__name__}: {str(error)[:500]}", details=details)


def _why(error_class: str, *, permanent: bool = False) -> dict[str, Any]:
    return {"error_class": error_class, "permanent": permanent}
