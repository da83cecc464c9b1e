"""How the last load of each model failed, and models whose load kills hosts.

After the second death in a row a model is refused for a while, or it would kill for ever.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from common.errors import FarmError, ModelLoadError
from config_db.spec import ModelSpec
from tasks.live_workers import LoadFailure
from workers.hosts.watchdog import LOAD_HANG

DEATHS_UNTIL_REFUSED: Final = 2
REFUSE_S: Final = 60.0
"""A model whose load has killed that many hosts is refused for so long."""
KEPT: Final = 50
"""Failures told to others; the latest."""


@dataclass(slots=True)
class _Deaths:
    """Hosts in a row that died loading one model, until when that counts, and how the last one died."""

    count: int = 0
    until: float = 0.0
    reason: str = ""


class LoadFailures:
    """What went wrong with each model since it was last loaded."""

    def __init__(self) -> None:
        self._deaths: dict[str, _Deaths] = {}
        self._last: dict[str, LoadFailure] = {}

    def host_died(self, spec: ModelSpec, reason: str) -> None:
        """A host died loading this model."""
        deaths = self._deaths.get(spec.digest, _Deaths())
        self._deaths[spec.digest] = _Deaths(deaths.count + 1, monotonic() + REFUSE_S, reason)
        self.failed(spec.digest, self._killed(spec).as_dict())

    def failed(self, spec_digest: str, error: Mapping[str, Any]) -> None:
        """A host could not load this model; a want of room is no fault of the model's."""
        if error["code"] != ModelLoadError.code:
            return
        self._last.pop(spec_digest, None)
        self._last[spec_digest] = LoadFailure(
            code=error["code"],
            message=error["message"],
            attempts=error.get("attempts", 1),
            permanent=error.get("permanent", False),
        )
        if len(self._last) > KEPT:
            del self._last[next(iter(self._last))]

    def loaded(self, spec_digest: str) -> None:
        """It loaded."""
        self._deaths.pop(spec_digest, None)
        self._last.pop(spec_digest, None)

    def last(self) -> Mapping[str, LoadFailure]:
        """How the last load failed, by the digest of the spec, of those that have not been loaded since."""
        return self._last

    def refusal(self, spec: ModelSpec) -> FarmError | None:
        """Why this model is not given to a host now."""
        deaths = self._deaths.get(spec.digest, _Deaths())
        if deaths.count < DEATHS_UNTIL_REFUSED or monotonic() >= deaths.until:
            return None
        return self._killed(spec)

    def _killed(self, spec: ModelSpec) -> ModelLoadError:
        deaths = self._deaths[spec.digest]
        error_class = (
            "TIMEOUT" if deaths.reason == LOAD_HANG else "OOM" if "out of memory" in deaths.reason else "ENGINE"
        )
        times = "once" if deaths.count == 1 else f"{deaths.count} times"
        return ModelLoadError(
            f"loading {spec.id} ended the model process {times} ({deaths.reason})",
            details={"error_class": error_class, "permanent": False, "attempts": deaths.count},
        )
