"""A family's use of kept copies: their names, finding one on its way to the device, keeping one beside what runs."""

import hashlib
from collections.abc import Mapping
from typing import Protocol

import msgspec
import torch
from transformers import __version__ as transformers_version

from workers.host import devices, precision
from workers.host.copies import Copies, Draft
from workers.host.families.protocol import Device
from workers.host.flat import FlatWeights


class Copied(Protocol):
    """A loaded model whose weights may be exchanged for the same numbers elsewhere."""

    @property
    def is_on_cpu(self) -> bool:
        """Whether its weights are in host memory."""

    def weights(self) -> dict[str, torch.Tensor] | None:
        """Its parameters as they run, by name; None once it is closed."""

    def adopt(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use the same numbers from elsewhere, also while it runs."""


class Judged(Protocol):
    """What is noted beside a copy; ``precision`` is what the weights were converted to."""

    @property
    def precision(self) -> str:
        """A name of ``precision.DTYPES``."""


def copy_name(key: tuple[str, str], device: Device) -> str:
    """Names a copy by what it is made of and what decides how it comes out."""
    made_by = (*key, device.kind, torch.__version__, transformers_version, precision.quick(device))
    return hashlib.sha256(":".join(made_by).encode()).hexdigest()[:40]


def find_copy(name: str, device: Device, *, keep: bool) -> FlatWeights | None:
    """The copy that was kept, on the device; None if there is none."""
    copies, host_memory = device.copies, device.host_memory
    if copies is None:
        return None
    if host_memory is None:
        found = copies.find(name)
    else:
        found = host_memory.bring(name, lambda: _page_locked(copies.find(name)), keep=keep)
    return found if found is None or device.kind == "cpu" else found.on(device.name)


def keep_copy(copies: Copies, name: str, model: Copied, verdict: Judged) -> None:
    """Keep what was found out, and the weights where they were converted; the model then uses the mapped ones.

    A model that leaves before its turn has come is not kept: it is converted again when it is wanted again.
    """

    def adopt() -> None:
        found = copies.find(name) if verdict.precision != "float32" and model.is_on_cpu else None
        if found is not None:
            model.adopt(found.tensors())
            devices.trim()  # what was converted lies in pieces over the heap

    def make() -> Draft | None:
        weights = model.weights()
        if weights is None:
            return None
        return Draft(weights if verdict.precision != "float32" else {}, msgspec.json.encode(verdict).decode(), adopt)

    copies.keep_soon(name, make)


def _page_locked(found: FlatWeights | None) -> FlatWeights | None:
    return found.page_locked() if found is not None and found.bytes else found
