"""Modules without weights, and weights hung into them: how a model comes back in milliseconds.

A module is kept when its model leaves, and its weights are let go; bringing a model back is mapping a file and hanging
its tensors in. Weights are memory-mapped, so that the hosts of a machine share their pages.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights

from workers.host.families.dense_folder import refusal
from workers.host.flat import FlatWeights

_META: Final = torch.device("meta")


class Skeletons:
    """Modules without weights, by architecture; owned by the compute side of one host."""

    def __init__(self) -> None:
        self._free: dict[str, list[torch.nn.Module]] = defaultdict(list)

    def take(self, architecture: str) -> torch.nn.Module | None:
        """A module to hang weights in, or None if this architecture has never been loaded."""
        free = self._free.get(architecture)
        if not free:
            return None
        if len(free) > 1:
            return free.pop()
        shared: dict[int, Any] = {id(one): one for one in (*free[0].parameters(), *free[0].buffers())}
        return copy.deepcopy(free[0], shared)  # both are replaced, never written to

    def learn(self, architecture: str, module: torch.nn.Module) -> None:
        """Have a skeleton of this architecture, made after a loaded module, unless there is one; '' is none."""
        if architecture and not self._free.get(architecture):
            known: dict[int, Any] = {id(one): _without_data(one) for one in module.parameters()}
            self._free[architecture].append(copy.deepcopy(module, known))

    def give_back(self, architecture: str, module: torch.nn.Module) -> None:
        """Keep a module whose model leaves, unless its architecture has no name; its weights are let go."""
        bare: dict[int, torch.nn.Parameter] = {}  # layers that share a weight go on sharing it
        for owner in module.modules():
            for name, tensor in owner._parameters.items():  # noqa: SLF001 - setattr would check and copy
                if tensor is not None and tensor.device != _META:
                    owner._parameters[name] = bare.setdefault(id(tensor), _without_data(tensor))  # noqa: SLF001
        if architecture:
            self._free[architecture].append(module)


def has_own_buffers(module: torch.nn.Module) -> bool:
    """Whether its files hold more than parameters: a skeleton of it would keep another model's numbers."""
    return bool(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())


def _without_data(parameter: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty_like(parameter, device=_META), requires_grad=False)


def blank_module(files: Path, auto: Any = AutoModel) -> torch.nn.Module:
    """A module as transformers' class loads it, but for its weights, which are not even initialised."""
    config = AutoConfig.from_pretrained(files, local_files_only=True, trust_remote_code=False)
    with no_init_weights():
        made: Any = auto.from_config(config, dtype=torch.float32)
    module: torch.nn.Module = made.requires_grad_(requires_grad=False).eval()
    return module


def revive(
    module: torch.nn.Module, files: Path, dtype: torch.dtype, *, flat: FlatWeights | None = None, prefix: str = ""
) -> torch.nn.Module | None:
    """Hang weights into a skeleton: those of a kept copy, or of a folder's files, mapped and converted.

    Args:
        module: the skeleton.
        files: the folder of the model.
        dtype: what the module runs in.
        flat: a kept copy; one without weights says that the files' own are run.
        prefix: what stands before the names in the files.

    Returns:
        The module; None, and nothing done, where the weights do not cover it.
    """
    if flat is not None and flat.bytes:
        return module if hang_in(module, flat.tensors()) else None
    return module if hang_in(module, converted(read_weights(files, prefix), dtype)) else None


def converted(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same weights in another number format, but for those that are no floats."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module, by name: one that several layers share stands there once."""
    return dict(module.named_parameters())


def hang_in(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    """Give a skeleton these weights, by name; false, and nothing done, if they do not cover it.

    A weight that layers share may stand there under any of its names.
    """
    wanted = dict(module.named_parameters(remove_duplicate=False))
    given = {id(parameter): weights[name] for name, parameter in wanted.items() if name in weights}
    if any(id(one) not in given or given[id(one)].shape != one.shape for one in wanted.values()):
        return False
    made = {key: torch.nn.Parameter(tensor, requires_grad=False) for key, tensor in given.items()}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():  # noqa: SLF001 - setattr would check and copy
            if parameter is not None:
                owner._parameters[name] = made.get(id(parameter), parameter)  # noqa: SLF001
    return True


def read_weights(files: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, memory-mapped, named as the bare encoder names them."""
    paths = sorted(files.glob("*.safetensors"))
    if not paths:
        raise refusal("its folder holds no safetensors weights; other formats can run code and are not loaded")
    found: dict[str, torch.Tensor] = {}
    for path in paths:
        found.update(load_file(path))
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in found.items()} if prefix else found
