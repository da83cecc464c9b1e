"""The option ``keep_alive``: for how long after a request its caller wants the model kept where it is."""

from collections.abc import Mapping
from typing import Any, Final

from common.errors import RequestError

OPTION: Final = "keep_alive"
MAX_S: Final = 3600.0
"""Longer is the operator's to say: pin the model, or give it ``idle_unload_s``."""


def check_keep_alive(options: Mapping[str, Any], *, param: str) -> None:
    """Refuse what is no number of seconds from 0 to ``MAX_S``; ``param`` is where the options stand.

    Raises:
        RequestError: it is not.
    """
    if options.get(OPTION) is not None and not _is_allowed(options[OPTION]):
        raise RequestError(f"keep_alive is a number of seconds from 0 to {MAX_S:.0f}", param=f"{param}.{OPTION}")


def keep_alive_s(options: Mapping[str, Any]) -> float | None:
    """The seconds asked for; None if nothing is asked that the door would have let through."""
    asked = options.get(OPTION)
    return float(asked) if asked is not None and _is_allowed(asked) else None


def _is_allowed(asked: Any) -> bool:
    return isinstance(asked, (int, float)) and not isinstance(asked, bool) and 0 <= asked <= MAX_S
