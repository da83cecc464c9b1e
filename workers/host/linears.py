"""Linear layers of a model that stays on a CPU, with their weights laid out as oneDNN computes with them.

torch's own layers keep weights as they were stored: in bfloat16 each call lays them out anew, in float32 the call goes
to a library that is half as fast on processors of another maker. What oneDNN is called with here is what torch's own
compiler uses when it freezes a model. It is private to torch, so it is tried and compared before it is used.
"""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

import torch

_DTYPES: Final = (torch.float32, torch.bfloat16)
_ROWS: Final = 128
"""Tokens in the pass that decides whether it pays; more make the gain larger in float32, smaller in bfloat16."""
_TRIES: Final = 5
_GAIN: Final = 1.03
_CLOSE: Final = 0.9999
"""Cosine of a layer's numbers to those of torch's own layer; both round, in another order."""


class _Packed:
    """Stands in for the ``forward`` of one layer."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)  # noqa: SLF001
        self._bias = None if layer.bias is None else layer.bias.detach()

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name that torch's layer has for it
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
            input, self._weight, self._bias, "none", [], ""
        )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Packed":
        """A copy of a layer computes with the same numbers; they are never written to."""
        return self


def packed_bytes(module: torch.nn.Module) -> int:
    """Bytes that ``pack`` takes beside the weights themselves; zero if there is nothing to pack."""
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in _layers(module))


def pack(module: torch.nn.Module) -> bool:
    """Lay out the weights of every linear layer; false, and nothing done, if that is no quicker here, or not the same.

    The weights themselves stay where they are: they are mapped files, which cost nothing until they are read.
    """
    layers = _layers(module)
    if not layers or not _pays(max(layers, key=lambda layer: layer.weight.numel())):
        return False
    for layer in layers:
        vars(layer)["forward"] = _Packed(layer)
    return True


def unpack(module: torch.nn.Module) -> None:
    """Let go of what ``pack`` has laid out."""
    for layer in module.modules():
        if isinstance(vars(layer).get("forward"), _Packed):
            del vars(layer)["forward"]


def _layers(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [
        layer
        for layer in module.modules()
        if type(layer) is torch.nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype in _DTYPES
    ]


def _pays(layer: torch.nn.Linear) -> bool:
    """Whether a packed layer gives the same numbers in less time."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_ROWS, layer.in_features, generator=generator).to(layer.weight.dtype)
    with torch.inference_mode():
        try:
            packed = _Packed(layer)
            found, plain = packed(rows).float(), layer(rows).float()
        except (RuntimeError, AttributeError, NotImplementedError):
            return False  # this build of torch has no oneDNN, or calls it otherwise
        is_same = torch.nn.functional.cosine_similarity(found, plain, dim=-1).min().item() >= _CLOSE
        return is_same and _least_s(lambda: layer(rows)) > _GAIN * _least_s(lambda: packed(rows))


def _least_s(call: Callable[[], Any]) -> float:
    """The shortest of a few calls, which others on the machine have disturbed least."""
    spent = []
    for _ in range(_TRIES):
        started = perf_counter()
        call()
        spent.append(perf_counter() - started)
    return min(spent)
