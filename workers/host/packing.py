"""Sort and pack: how the texts of a micro-batch are laid out over forward passes. No torch.

Texts are sorted by length, so that equal lengths stand together: a padding-free pass runs each such group as one block,
a padded pass wastes little.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` texts of ``length`` tokens each, side by side from token ``start`` of a pass."""

    start: int
    count: int
    length: int

    @property
    def end(self) -> int:
        """The token after the last."""
        return self.start + self.count * self.length


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: which texts (places in the micro-batch, shortest first), and their groups of equal length."""

    rows: tuple[int, ...]
    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return self.groups[-1].end

    @property
    def width(self) -> int:
        """The longest text."""
        return self.groups[-1].length


def plan(lengths: Sequence[int], *, pass_tokens: int, padded: bool, places: Sequence[int] | None = None) -> list[Pass]:
    """Lay texts out over as few passes as hold ``pass_tokens`` each; a longer text has a pass of its own.

    Args:
        lengths: tokens of each text of the micro-batch, at least 1.
        pass_tokens: the budget of a pass, in tokens; with ``padded`` the padding counts.
        padded: whether a pass is padded to its longest text.
        places: which texts are run; None: all.
    """
    order = sorted(range(len(lengths)) if places is None else places, key=lengths.__getitem__)
    passes: list[Pass] = []
    rows: list[int] = []
    tokens = 0
    for row in order:
        length = lengths[row]
        cost = (len(rows) + 1) * length if padded else tokens + length
        if rows and cost > pass_tokens:
            passes.append(_pass(rows, lengths))
            rows, tokens = [], 0
        rows.append(row)
        tokens += length
    if rows:
        passes.append(_pass(rows, lengths))
    return passes


def _pass(rows: Sequence[int], lengths: Sequence[int]) -> Pass:
    groups: list[Group] = []
    start = 0
    for row in rows:
        length = lengths[row]
        if groups and groups[-1].length == length:
            last = groups[-1]
            groups[-1] = Group(last.start, last.count + 1, length)
        else:
            groups.append(Group(start, 1, length))
        start += length
    return Pass(tuple(rows), tuple(groups))
