"""What stands behind the question mark of an address; RequestError names the parameter that is not as it should be."""

from typing import Final

from flask import request

from common.errors import RequestError

_MOST: Final = 2**62 - 1


def read_number(name: str, *, at_least: int = 0, at_most: int = _MOST) -> int | None:
    """A whole number in its bounds; None if it is not given."""
    text = request.args.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20 and at_least <= int(text) <= at_most):
        bounds = f"of {at_least} to {at_most}" if at_most < _MOST else f"of {at_least} or more"
        raise RequestError(f"{name} takes a whole number {bounds}", param=name)
    return int(text)


def read_wait_s(most_s: float) -> float:
    """For how long the caller would wait, in whole seconds, at most ``most_s``; zero if they do not say."""
    return min(read_number("wait") or 0, most_s)
