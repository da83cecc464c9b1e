"""Whether a process serves what was published: the one place that decides it, for whoever waits."""

from typing import NamedTuple


class Epoch(NamedTuple):
    """An epoch as processes tell it; an empty ``id`` is not told."""

    number: int
    id: str


def has_reached(served: Epoch, wanted: int, present: Epoch) -> bool:
    """Whether who serves ``served`` serves the epoch ``wanted`` or a later one.

    Args:
        served: what a process tells.
        wanted: the number of an epoch.
        present: the present epoch. Who is ahead of it, or has another at the same number, has read a history that a
            restored backup has ended.
    """
    if served.number == present.number:
        return wanted <= served.number and served.id in (present.id, "")
    return wanted <= served.number < present.number
