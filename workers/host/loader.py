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
from config_db.spec import ModelSpec
from workers.host import devices
from workers.host.families.protocol import Device, Family, Model
from workers.host.families.registry import find
from workers.host.frames import HostSetup
from workers.host.residency import Residency

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

    def preload(self, digest: str, spec: ModelSpec) -> None:
        """Load on a hint: only if there is room, or what is in the way lies idle. Failures are told, not raised."""
        if digest in self._residency.resident() or self._remembered(digest) is not None:
            self._tell(digest, "skipped", {})
            return
        try:
            self._load(digest, spec, wait_s=0.0, idle_s=HINT_IDLE_S)
        except CapacityError:
            self._tell(digest, "skipped", {})
        except FarmError as error:
            self._tell(digest, "load_failed", {"error": error.as_dict()})

    def _load(self, digest: str, spec: ModelSpec, *, wait_s: float, idle_s: float) -> float:
        """Load and admit; returns the seconds it took. FarmError, whatever goes wrong."""
        started = monotonic()
        self._tell(digest, "loading", {})
        try:
            family, files = self._family(spec.family), self._files(spec)
            estimate = family.estimate_bytes(spec, files)
            with self._residency.reserved(digest, estimate, wait_s=wait_s, idle_s=idle_s):
                model = self._load_files(family, spec, files)
                size = self._residency.admit(digest, model, pinned=spec.placement.pinned, wait_s=wait_s)
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

    def _files(self, spec: ModelSpec) -> Path:
        from workers.weights.resolve import resolve

        return resolve(
            spec.source,
            allowed_roots=tuple(Path(root) for root in self._setup.model_dirs),
            cache_dir=Path(self._setup.hub_cache) if self._setup.hub_cache else None,
        )

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


def load_error(spec: ModelSpec, error: Exception, attempts: int) -> ModelLoadError:
    """Whatever a load raised, as the one error callers know: its class, whether trying again helps, how often tried."""
    if isinstance(error, ModelLoadError):
        details = {**_why("UNKNOWN"), **error.details, "attempts": attempts}
        return ModelLoadError(error.message, param=error.param, details=details)
    if devices.is_out_of_memory(error):
        details = {**_why("OOM"), "attempts": attempts}
        return ModelLoadError(f"{spec.id} cannot be loaded: the device has not the memory for it", details=details)
    details = {**_why("ENGINE"), "attempts": attempts}
    return ModelLoadError(f"{spec.id} cannot be loaded: {type(error).__name__}: {str(error)[:500]}", details=details)


def _why(error_class: str, *, permanent: bool = False) -> dict[str, Any]:
    return {"error_class": error_class, "permanent": permanent}
