"""Models that score pairs, with adapters: requests for different adapters of one base in one forward pass."""

from collections.abc import Sequence

import torch

from workers.host.adapted import divide, divided
from workers.host.families.pairs import PairModel, PreparedPairs, Runner, Tokens
from workers.host.packing import Pass
from workers.host.rack import Rack


class _OwnedRunner:
    """Runs each pair through the adapter of its request; ``owners`` says whose each pair of the micro-batch is."""

    def __init__(self, runner: Runner, device: torch.device) -> None:
        self._runner = runner
        self._device = str(device)
        self.bytes = 0
        self.owners: Sequence[str] = ()

    def score(self, rows: Sequence[Tokens], one: Pass) -> torch.Tensor:
        """As the base's runner, each pair through its own adapter."""
        owners = [self.owners[row] for row in one.rows]
        with divided(divide(owners, [1] * len(owners), axis=0, device=self._device)):
            return self._runner.score(rows, one)

    @property
    def module(self) -> torch.nn.Module:
        """With the adapters."""
        return self._runner.module

    def on(self, module: torch.nn.Module) -> Runner:
        """One without adapters."""
        return self._runner.on(module)

    def close(self) -> None:
        """The weights are the base's."""


class AdaptedPairs(PairModel):
    """The requests of one base that name an adapter, by its digest under ``options["lora"]``."""

    def __init__(self, base: PairModel, module: torch.nn.Module, rack: Rack) -> None:
        self.__dict__.update(base.__dict__)  # all as the base does it, but for the module
        self._owned = _OwnedRunner(self._runner.on(module), next(module.parameters()).device)
        self._runner = self._owned
        self._rack = rack

    def run(self, prepared: PreparedPairs) -> torch.Tensor:
        """Scores of all pairs, each with its adapter."""
        with self._rack.running():
            self._owned.owners = [
                str(part.request.options["lora"]) for part in prepared.parts for _ in prepared.rows[part.rows]
            ]
            return super().run(prepared)
