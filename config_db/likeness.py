"""Which names are like one that was asked for: by the pairs of letters they share, whatever their case.

Names are callers' to choose and this runs on the event loop: the work for each known name is one operation on two
numbers, however long the names are. A thousand names take about 0.3 ms.
"""

from collections.abc import Iterable
from functools import lru_cache
from itertools import islice, pairwise
from typing import Final

MOST_COMPARED: Final = 5_000
LETTERS_COMPARED: Final = 200
LEAST: Final = 0.55
"""Names that share less than this are not alike; 1 is the same."""
_BITS: Final = 1021


class Likeness:
    """Known names, and what each stands for."""

    def __init__(self, names: Iterable[tuple[str, str]]) -> None:
        self._known = [(_pairs(name), _pairs(_last(name)), meant) for name, meant in islice(names, MOST_COMPARED)]

    def nearest(self, wanted: str, most: int) -> list[str]:
        """What the names like ``wanted``, or with a last part like its own, stand for; the most similar first."""
        whole, last = _pairs(wanted), _pairs(_last(wanted))
        best: dict[str, float] = {}
        for known, known_last, meant in self._known:
            share = max(_share(whole, known), _share(last, known_last))
            if share >= LEAST and share > best.get(meant, 0):
                best[meant] = share
        return sorted(best, key=lambda meant: (-best[meant], meant))[:most]


def remember(names: Iterable[str]) -> None:
    """Do ahead what comparing with these names takes, but for a third of a microsecond each."""
    for name in names:
        _pairs(name)
        _pairs(_last(name))


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _share(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Twice what two names share of what they have in all."""
    return 2 * (one[0] & other[0]).bit_count() / (one[1] + other[1])


@lru_cache(maxsize=1 << 15)  # from epoch to epoch the names are almost the same
def _pairs(name: str) -> tuple[int, int]:
    """The pairs of neighbouring letters as the bits of a number, and how many bits are set."""
    letters = f"\n{name[:LETTERS_COMPARED].lower()}\n"
    bits = 0
    for first, second in pairwise(letters):
        bits |= 1 << ((ord(first) * 31 + ord(second)) % _BITS)
    return bits, bits.bit_count()
