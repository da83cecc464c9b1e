"""Paths of fields as readers of a document write them: ``limits.max_items``, ``outputs[0]``, ``prompts['a query']``."""

import re
from typing import Final

NAME_SHOWN: Final = 100
_PLAIN: Final = re.compile(r"[\w-]+")


def below(at: str, name: str) -> str:
    """The path of a field in the part at the path ``at``; that of the whole document is empty."""
    if len(name) > NAME_SHOWN:
        name = f"{name[:NAME_SHOWN]}..."
    if not _PLAIN.fullmatch(name):
        return f"{at}[{name!r}]"
    return f"{at}.{name}" if at else name


def joined(at: str, path: str) -> str:
    """The path ``path`` as seen from where the part at ``at`` stands."""
    return f"{at}.{path}" if at and path and not path.startswith("[") else f"{at}{path}"


def leads_to(outer: str, path: str) -> bool:
    """Whether the part at ``outer`` is that at ``path``, or holds it."""
    return path == outer or path.startswith((f"{outer}.", f"{outer}["))
