"""An encoder whose module has adapters: texts of different adapters in one pass, padded or side by side."""

from collections.abc import Sequence
from typing import Any

import torch

from workers.host.adapted import divided
from workers.host.encoder import Encoder, set_attention
from workers.host.packing import Pass


class AdaptedEncoder(Encoder):
    """Runs each text of a micro-batch through the adapter that owns it."""

    def hidden(self, texts: Sequence[Sequence[int]], one: Pass) -> list[torch.Tensor]:
        """As the base's."""
        is_packed = self.layout.packed
        counts = [len(texts[row]) if is_packed else 1 for row in one.rows]
        with divided(one.rows, counts, axis=int(is_packed), device=self.device):
            return super().hidden(texts, one)

    def partly_seen(
        self, texts: Sequence[Sequence[int]], rows: Sequence[int], seen: Sequence[int], attention: str
    ) -> torch.Tensor:
        """As the base's."""
        with divided(rows, [1] * len(rows), axis=0, device=self.device):
            return super().partly_seen(texts, rows, seen, attention)


def with_adapters(base: Encoder, module: torch.nn.Module) -> AdaptedEncoder:
    """What runs a module with adapters as an encoder runs its own."""
    set_attention(module, base.layout.attention)  # it was copied amid any pass
    pooler = getattr(module, "pooler", None)
    if pooler is not None:  # its result is not looked at, and of texts side by side it would see one token
        pooler.forward = _nothing
    return AdaptedEncoder(module, base.layout, base.device, base.takes)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a layer that nobody looks at."""
