"""How the search for weights fails: for good, or for now.

What leaves this package is a ModelLoadError whose details say the class, whether trying again helps, what to do about
it and which tiers were tried. Between its modules a PassingError says that the same try may succeed soon.
"""

import re
from collections.abc import Sequence
from typing import Final

from common.errors import ModelLoadError
from common.logs import get_logger

log = get_logger("host")

_QUERY: Final = re.compile(r"\?[^\s'\"]*")
_SECRET: Final = re.compile(r"\bhf_\w+|(?i:bearer) +\S+")


class PassingError(Exception):
    """It may succeed soon; ``wait_s`` is how long the other side asks for patience."""

    def __init__(self, why: str, *, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class DamagedError(Exception):
    """What came is not what was promised: its digest or size differs."""


def failure(
    why: str,
    error_class: str,
    *,
    permanent: bool,
    remedy: str | None = None,
    retry_after_s: float | None = None,
    tried: Sequence[str] = (),
) -> ModelLoadError:
    """The error for weights that cannot be had."""
    details = {"error_class": error_class, "permanent": permanent}
    if remedy is not None:
        details["remedy"] = remedy
    if tried:
        details["tried"] = list(tried)
    message = f"the model cannot be loaded: {why}" + (f"; {remedy}" if remedy else "")
    return ModelLoadError(message, details=details, retry_after_s=retry_after_s)


def no_weights(where: str, formats: Sequence[str]) -> ModelLoadError:
    """What lies there holds no weights in a format that the spec trusts."""
    if "pickle" in formats:
        return failure(f"{where} holds no weights", "CONFIG", permanent=True, remedy="correct the source")
    return failure(
        f"{where} holds no safetensors weights; other formats can run code and are not loaded",
        "CONFIG",
        permanent=True,
        remedy="name a revision with safetensors, convert the weights, or have its spec trust `pickle`",
    )


def tried(error: ModelLoadError, tiers: Sequence[str]) -> ModelLoadError:
    """The same error, saying which tiers were tried before and with it."""
    error.details["tried"] = list(tiers)
    return error


def storage_failure(error: OSError, where: object) -> ModelLoadError:
    """The disk does not take it; where it lies is for the log, not for callers."""
    log.warning("weights_not_written", path=str(error.filename or where), error=said(error))
    return failure(
        f"this worker's disk does not take its files: {error.strerror or said(error)}",
        "STORAGE",
        permanent=False,
        remedy="free space on this worker's disk (`farmhand models prune`), or set FARMHAND_WEIGHTS_DIR to another",
    )


def said(error: BaseException) -> str:
    """The first line of an error, without what may hold a secret: queries of signed URLs, tokens."""
    text = str(error).strip() or type(error).__name__
    return _SECRET.sub("...", _QUERY.sub("", text.splitlines()[0]))[:300]
