"""The second model of a base, whose module has adapters: runs requests for different adapters in one forward pass."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from workers.host.adapted import owned
from workers.host.families.protocol import Model


class AdaptedModel:
    """The requests of one base that name an adapter, by its digest under ``options["lora"]``.

    Args:
        model: runs the module with adapters as the base runs its own.
        hold: keeps what hangs as it is while texts of these adapters, one for each text, run in a block.
    """

    bytes = 0
    """The weights are the base's; adapters are booked one by one."""

    def __init__(self, model: Model, hold: Callable[[Sequence[str]], AbstractContextManager[None]]) -> None:
        self._model = model
        self._hold = hold
        self.prepare = model.prepare
        self.finish = model.finish

    def run(self, prepared: Any) -> Any:
        """As the base does, each text with the adapter of its request."""
        owners = [
            str(part.request.options["lora"]) for part in prepared.parts for _ in range(part.rows.start, part.rows.stop)
        ]
        with self._hold(owners), owned(owners):
            return self._model.run(prepared)

    def close(self) -> None:
        """Nothing is its own."""
