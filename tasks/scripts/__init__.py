"""The Lua scripts by which processes change the farm's shared state in Redis, one file each, read once."""

import hashlib
from functools import cache
from importlib.resources import files


@cache
def source(name: str) -> str:
    """The text of ``<name>.lua``."""
    return (files(__package__) / f"{name}.lua").read_text(encoding="utf-8")


@cache
def sha(name: str) -> str:
    """The digest under which Redis keeps the script once it is loaded."""
    return hashlib.sha1(source(name).encode(), usedforsecurity=False).hexdigest()
