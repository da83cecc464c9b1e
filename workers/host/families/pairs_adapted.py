"""Runs pairs through a module with adapters: pairs of different adapters in one padded pass."""

from collections.abc import Sequence

import torch

from workers.host.adapted import divided
from workers.host.families.pairs import Runner, Tokens
from workers.host.packing import Pass


class AdaptedRunner:
    """Runs each pair of a micro-batch through the adapter that owns it.

    Args:
        runner: of the module with adapters.
        device: where that is.
    """

    bytes = 0
    """The weights are the base's."""

    def __init__(self, runner: Runner, device: torch.device) -> None:
        self._runner = runner
        self._device = str(device)

    def score(self, rows: Sequence[Tokens], one: Pass) -> torch.Tensor:
        """As the base's runner."""
        with divided(one.rows, [1] * len(one.rows), axis=0, device=self._device):
            return self._runner.score(rows, one)

    @property
    def module(self) -> torch.nn.Module:
        """With the adapters."""
        return self._runner.module

    def on(self, module: torch.nn.Module) -> Runner:
        """One without adapters."""
        return self._runner.on(module)

    def close(self) -> None:
        """Nothing is its own."""
