"""Dense encoders with adapters: requests for different adapters of one base in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from workers.host.adapted import divide, divided
from workers.host.encoder import Encoder
from workers.host.families.dense import DenseModel, PreparedTexts
from workers.host.packing import Pass
from workers.host.rack import Rack


@dataclass(slots=True)
class AdaptedEncoder(Encoder):
    """An encoder whose module has adapters; ``owners`` says whose each text of the micro-batch is that runs now."""

    owners: Sequence[str] = ()

    def hidden(self, texts: Sequence[Sequence[int]], one: Pass) -> list[torch.Tensor]:
        """As the base's, each text through its own adapter."""
        owners = [self.owners[row] for row in one.rows]
        is_packed = self.layout.packed
        counts = [len(texts[row]) if is_packed else 1 for row in one.rows]
        with divided(divide(owners, counts, axis=int(is_packed), device=self.device)):
            return Encoder.hidden(self, texts, one)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a layer that nobody looks at."""


class AdaptedDense(DenseModel):
    """The requests of one base that name an adapter, by its digest under ``options["lora"]``."""

    _encoder: AdaptedEncoder
    _rack: Rack

    def __init__(self, base: DenseModel, module: torch.nn.Module, rack: Rack) -> None:
        self.__dict__.update(base.__dict__)  # all as the base does it, but for the module
        shape = {field.name: getattr(self._encoder, field.name) for field in fields(Encoder)}
        self._encoder = AdaptedEncoder(**{**shape, "module": module})
        self._rack = rack
        pooler = getattr(module, "pooler", None)
        if pooler is not None:  # its result is not looked at, and of texts side by side it would see one token
            pooler.forward = _nothing

    def run(self, prepared: PreparedTexts) -> torch.Tensor:
        """Vectors of all texts, each with its adapter."""
        with self._rack.running():
            self._encoder.owners = [
                str(part.request.options["lora"]) for part in prepared.requests for _ in prepared.ids[part.rows]
            ]
            return super().run(prepared)
