"""Extractors with adapters: texts of different adapters in one padded pass."""

from collections.abc import Sequence
from typing import Any

from workers.host.adapted import divided
from workers.host.families.extraction import ExtractModel, RowPass


class AdaptedExtractModel(ExtractModel):
    """Runs each row of a micro-batch through the adapter that owns it.

    Args:
        model: runs a module with adapters as its base runs its own.
    """

    def __init__(self, model: ExtractModel) -> None:
        vars(self).update(vars(model))
        self._device = str(next(self._extractor.module.parameters()).device)

    def _run_pass(self, one: RowPass) -> Sequence[Any]:
        with divided(one.places, [1] * len(one.places), axis=0, device=self._device):
            return super()._run_pass(one)
