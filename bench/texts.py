"""The texts that are measured, equal for farm and ceiling: seeded, so that every run sees the same."""

import random
from collections.abc import Callable
from typing import Final

_PROSE: Final = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most made
after also did many off before must well back through years much where your way down should because long each just
state people those too how little good world make very year still see work men day get here own life both between being
under three never know same last another while us might great go come since against right came take used himself few
house use place during high without again home small around server model vector query index batch database request
worker memory network latency storage compute engine
"""
WORDS: Final = tuple(_PROSE.split())


def short(count: int, seed: int = 1) -> list[str]:
    """Texts of 8 to 20 words."""
    return _texts(count, seed, lambda dice: dice.randint(8, 20))


def mixed(count: int, seed: int = 1) -> list[str]:
    """Texts of 5 to 250 words, log-uniform."""
    return _texts(count, seed, lambda dice: round(5 * 50 ** dice.random()))


def _texts(count: int, seed: int, length: Callable[[random.Random], int]) -> list[str]:
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS, k=length(dice))) for _ in range(count)]
