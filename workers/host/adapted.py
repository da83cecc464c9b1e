"""Linear layers with adapters, several of them in one forward pass: which tokens or rows belong to whom.

The layers are peft's; whose the texts of a micro-batch are, and how a pass is divided, is set round its run and round
each forward, for the thread that runs it. Where the adapters of a pass do not stand side by side they are brought
together once a layer, so that each costs two small products.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from threading import local
from typing import Any, cast

import torch
from peft.tuners import lora


@dataclass(frozen=True, slots=True)
class Division:
    """Whose the places along ``axis`` of a pass are.

    ``parts`` are adapters with the first of their places and how many there are, after ``order`` was applied, which
    ``back`` undoes; both are None where the places of each adapter stand side by side. One part: it has the whole.
    """

    axis: int
    size: int
    parts: tuple[tuple[str, int, int], ...]
    order: torch.Tensor | None = None
    back: torch.Tensor | None = None


def divide(owners: Sequence[str], counts: Sequence[int], *, axis: int, device: str) -> Division:
    """The division of a pass whose ``i``-th text has ``counts[i]`` places and belongs to the adapter ``owners[i]``."""
    size = sum(counts)
    pairs = groupby(zip(owners, counts, strict=True), key=itemgetter(0))
    runs = [(name, sum(count for _, count in run)) for name, run in pairs]
    names = dict.fromkeys(owners)
    if len(runs) == len(names):
        return Division(axis, size, _laid_out(runs))
    numbers = {name: number for number, name in enumerate(names)}
    places = torch.repeat_interleave(torch.tensor([numbers[name] for name in owners]), torch.tensor(counts))
    order = torch.argsort(places, stable=True)
    totals = torch.bincount(places, minlength=len(names)).tolist()
    parts = _laid_out(list(zip(names, totals, strict=True)))
    return Division(axis, size, parts, order.to(device), torch.argsort(order).to(device))


def _laid_out(runs: Sequence[tuple[str, int]]) -> tuple[tuple[str, int, int], ...]:
    parts, start = [], 0
    for name, count in runs:
        parts.append((name, start, count))
        start += count
    return tuple(parts)


class UndividedError(RuntimeError):
    """What a layer is given cannot be told apart by adapter: its model runs one at a time."""


class _Current(local):
    owners: Sequence[str] = ()
    division: Division | None = None


_current = _Current()


@contextmanager
def owned(owners: Sequence[str]) -> Iterator[None]:
    """Let the texts of a micro-batch that runs in the block, in this thread, be of these adapters, one for each."""
    _current.owners = owners
    try:
        yield
    finally:
        _current.owners = ()


@contextmanager
def divided(rows: Sequence[int], counts: Sequence[int], *, axis: int, device: str) -> Iterator[None]:
    """Divide what adapted layers in the block, in this thread, are given: ``counts[i]`` places for text ``rows[i]``."""
    _current.division = divide([_current.owners[row] for row in rows], counts, axis=axis, device=device)
    try:
        yield
    finally:
        _current.division = None


class AdaptedLinear(lora.Linear):
    """A linear layer of a base and what each adapter adds to it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's result, and on each adapter's places what that adapter adds."""
        division = _current.division
        if division is None:
            raise RuntimeError("a module with adapters was run without saying whose its input is")
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        parts = [part for part in division.parts if part[0] in self.lora_A]
        if not parts:
            return result
        if len(division.parts) == 1:
            return result.add_(self._added(parts[0][0], x))
        axis = division.axis
        if x.shape[axis] != division.size:
            raise UndividedError(f"a layer was given {tuple(x.shape)}, which is not its pass of {division.size}")
        together = x if division.order is None else x.index_select(axis, division.order)
        added = torch.empty_like(result) if len(parts) == len(division.parts) else torch.zeros_like(result)
        for name, start, count in parts:
            added.narrow(axis, start, count).copy_(self._added(name, together.narrow(axis, start, count)))
        return result.add_(added if division.back is None else added.index_select(axis, division.back))

    def _added(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What one adapter adds: its scaling is applied between the two products, where there is least of it."""
        scaling, outer = self.scaling[name], cast("torch.nn.Linear", self.lora_B[name])
        inner = self.lora_A[name](x).mul_(scaling)
        added = torch.nn.functional.linear(inner, outer.weight)
        return added if outer.bias is None else added.add_(outer.bias, alpha=scaling)
