"""Models whose load kills hosts: after the second death they are refused for a while, or they would kill for ever."""

from time import monotonic
from typing import Final

from common.errors import FarmError, ModelLoadError
from config_db.spec import ModelSpec
from workers.hosts.watchdog import LOAD_HANG

DEATHS_UNTIL_REFUSED: Final = 2
REFUSE_S: Final = 60.0
"""A model whose load has killed that many hosts is refused for so long."""


class LoadDeaths:
    """How many hosts in a row each model's load has killed, until when that counts, and the last reason."""

    def __init__(self) -> None:
        self._deaths: dict[str, tuple[int, float, str]] = {}

    def note(self, spec_digest: str, reason: str) -> None:
        """A host died loading this model."""
        deaths = self._deaths.get(spec_digest, (0, 0.0, ""))[0] + 1
        self._deaths[spec_digest] = (deaths, monotonic() + REFUSE_S, reason)

    def forget(self, spec_digest: str) -> None:
        """It loaded."""
        self._deaths.pop(spec_digest, None)

    def refusal(self, spec: ModelSpec) -> FarmError | None:
        """Why this model is not given to a host now."""
        deaths, until, reason = self._deaths.get(spec.digest, (0, 0.0, ""))
        if deaths < DEATHS_UNTIL_REFUSED or monotonic() >= until:
            return None
        error_class = "TIMEOUT" if reason == LOAD_HANG else "OOM" if "out of memory" in reason else "ENGINE"
        details = {"error_class": error_class, "permanent": False, "attempts": deaths}
        return ModelLoadError(f"loading {spec.id} ended the model process {deaths} times ({reason})", details=details)
