"""Everything that is wrong with a document, for people who mend files: ``read_model`` stops at the first."""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final

import msgspec

from common.errors import FarmError

MOST_FAULTS: Final = 20
_REQUIRED: Final = {"id": "x", "family": "x", "source": {"path": "/x"}}
"""What stands in for a field that must be there, so that the rest can be looked at; a family that nobody knows, since
what the model does is held against one that is known."""
_STEP: Final = re.compile(r"\[(\d+)\]|\[(?:'([^']*)'|\"([^\"]*)\")\]|([^.\[\]]+)")


class Fault(msgspec.Struct, frozen=True):
    """One thing that is wrong in a file; ``param`` is the field's path, as ``models[3].limits``, if it is a field's."""

    file: str
    message: str
    param: str | None = None

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{self.file}: {self.message}"


def all_faults(document: Any, read: Callable[[Any], Any]) -> list[FarmError]:
    """What ``read`` refuses in a document: each time with the field before left out, or with a good one in its place.

    Args:
        document: what a file holds; it is left as it is.
        read: raises FarmError with the field's path at the first fault.
    """
    found: list[FarmError] = []
    mended_at: list[str] = []
    mended = deepcopy(document)
    while len(found) < MOST_FAULTS:
        try:
            read(mended)
        except FarmError as error:
            path = error.param or ""
            if path in mended_at:
                break
            if not any(
                one.startswith(path) for one in mended_at
            ):  # else it is the mending below it that does not please
                found.append(error)
            mended_at.append(path)
            if not _mend(mended, path):
                break
        else:
            break
    return found


def _mend(document: Any, path: str) -> bool:
    """Take away what the path leads to, or as far as it leads; false if it leads nowhere."""
    steps = [int(number) if number else one or other or name for number, one, other, name in _STEP.findall(path)]
    if not isinstance(document, dict) or not steps:
        return False
    if steps[0] in _REQUIRED:
        document[steps[0]] = deepcopy(_REQUIRED[str(steps[0])])
        if steps[0] == "family":
            document.setdefault("unsupported", "its family is not known")  # else no document may name such a one
        return True
    holder: Any = None
    part = document
    for place, step in enumerate(steps):
        if not _leads_on(part, step):
            break
        holder, last, part = part, steps[place], part[step]
    if holder is None:
        return False
    del holder[last]
    return True


def _leads_on(part: Any, step: int | str) -> bool:
    if isinstance(part, list):
        return isinstance(step, int) and step < len(part)
    return isinstance(part, dict) and step in part
