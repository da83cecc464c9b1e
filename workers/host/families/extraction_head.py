"""Extractors that are one of transformers' models with a head, run over padded rows; such a model takes adapters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch

from config_db.spec import ModelSpec
from workers.host.families.adaptable import Adaptable, like
from workers.host.families.extraction import ExtractModel, Extractor, Row
from workers.host.families.heads import Head
from workers.host.families.padding import pad
from workers.host.families.protocol import Device


class HeadExtractor(Extractor):
    """The passes of such an extractor; what a row is, and what its logits tell, is for those that are made of it."""

    def __init__(self, spec: ModelSpec, head: Head, device: Device) -> None:
        self._spec = spec
        self._head = head
        self._device = device.name

    @property
    def module(self) -> torch.nn.Module:
        module: torch.nn.Module = self._head.module
        return module

    def on(self, module: torch.nn.Module) -> Self:
        """One that runs another module."""
        return like(self, _head=replace(self._head, module=module))

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return pad([row.inputs for row in rows], self._head.tokenizer)

    def run(self, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        logits = self._head.module(**{name: tensor.to(self._device) for name, tensor in batch.items()}).logits
        return list(logits.float().cpu())


class HeadExtractModel(Adaptable, ExtractModel):
    """One loaded extractor of this kind."""

    _extractor: HeadExtractor

    @property
    def module(self) -> torch.nn.Module:
        """The whole one: its head takes adapters, too."""
        return self._extractor.module

    def on(self, module: torch.nn.Module) -> ExtractModel:
        """One that extracts with another module."""
        from workers.host.families.extraction_adapted import AdaptedExtractModel

        return AdaptedExtractModel(like(self, _extractor=self._extractor.on(module)))

    def close(self) -> None:
        """Let the weights go, and the adapters."""
        Adaptable.close(self)
        ExtractModel.close(self)
