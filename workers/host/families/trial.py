"""The first run of a folder: tries layouts and precisions against a plain padded float32 run.

What is tried is what the family makes of texts; the quickest layout and precision in which that is the same are taken.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from common.logs import get_logger
from config_db.spec import ModelSpec
from workers.host import devices, precision
from workers.host.encoder import Layout, attention_window, cast, in_format, layouts, plain_layout
from workers.host.families.protocol import Device

log = get_logger("host")

EQUAL: Final = 0.9999
"""Cosine between a packed and a padded run that says they compute the same thing."""

Run = Callable[[torch.nn.Module, Layout, Sequence[str]], torch.Tensor]
"""What the family makes of texts, ``[N, D]``, with a module run in a layout."""


class Judged(NamedTuple):
    """A module in the layout and precision that were found for it."""

    module: torch.nn.Module
    layout: Layout
    precision: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One folder's.

    Args:
        base: the bare encoder in a module.
        run: what is compared.
        restore: gives a module its float32 weights back after a lower precision was refused; maybe another module.
    """

    spec: ModelSpec
    device: Device
    base: Callable[[torch.nn.Module], torch.nn.Module]
    run: Run
    restore: Callable[[torch.nn.Module], torch.nn.Module]

    def judge(self, module: torch.nn.Module) -> Judged:
        """Find out everything about a module that was loaded in float32."""
        base = self.base(module)
        texts, padded = precision.check_texts(attention_window(base)), plain_layout(base)
        plain = self.run(module, padded, texts)
        found = self._packed(module, texts, plain) or padded
        module, chosen = self._precise(module, found, texts, plain)
        log.info(
            "model_judged",
            model=self.spec.id,
            packed=found.packed,
            first_position=found.first_position,
            precision=chosen,
        )
        return Judged(module, found, chosen)

    def judge_alike(self, module: torch.nn.Module, layout: Layout) -> Judged:
        """The same for weights of an architecture whose layout is known: only the precision depends on them."""
        wanted, texts = precision.candidates(self.spec.precision, self.device), precision.FEW_CHECK_TEXTS
        if len(wanted) == 1:
            return Judged(cast(module, precision.DTYPES[wanted[0]]), layout, wanted[0])
        with ThreadPoolExecutor(1, "format") as aside:  # both wait for memory more than they compute
            converted = aside.submit(list, in_format(module, precision.DTYPES[wanted[0]]))
            plain = self.run(module, layout, texts)
            for parameter, numbers in converted.result():
                parameter.data = numbers
        module, chosen = self._precise(module, layout, texts, plain)
        return Judged(module, layout, chosen)

    def _packed(self, module: torch.nn.Module, texts: Sequence[str], plain: torch.Tensor) -> Layout | None:
        """The packed layout that computes what the plain run does, if there is one."""
        cosines: list[float] = []
        for layout in layouts(self.base(module), self.device.kind):
            cosines.append(self._compare(module, layout, texts, plain))
            if cosines[-1] >= EQUAL:
                return layout
        if cosines:
            log.info("padding_free_refused", model=self.spec.id, cosine=round(max(cosines), 6))
        return None

    def _precise(
        self, module: torch.nn.Module, layout: Layout, texts: Sequence[str], plain: torch.Tensor
    ) -> tuple[torch.nn.Module, str]:
        """The module in the lowest precision that is good enough."""
        *tried, last = precision.candidates(self.spec.precision, self.device)
        for name in tried:
            cosine = self._compare(cast(module, precision.DTYPES[name]), layout, texts, plain)
            if cosine >= precision.SAME:
                return module, name
            log.warning("precision_refused", model=self.spec.id, precision=name, cosine=round(cosine, 6))
            module = self.restore(module)
        return cast(module, precision.DTYPES[last]), last

    def _compare(self, module: torch.nn.Module, layout: Layout, texts: Sequence[str], plain: torch.Tensor) -> float:
        try:
            return precision.worst_cosine(self.run(module, layout, texts), plain)
        except Exception as error:
            if devices.is_out_of_memory(error) or devices.is_device_lost(error):
                raise  # says nothing about the layout
            log.debug("layout_refused", model=self.spec.id, packed=layout.packed, error=repr(error)[:200])
            return -1.0
