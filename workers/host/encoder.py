"""A transformers encoder as the dense family runs it: a module, its weights, and the passes over it.

Weights are memory-mapped, so that the hosts of a machine share their pages. A module without weights (a skeleton) is
kept when its model leaves: bringing a model back is mapping a file and hanging its tensors in.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from workers.host.attention import NAME, layout
from workers.host.families.dense_folder import refusal
from workers.host.packing import Pass

_META: Final = torch.device("meta")

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a host has no terminal


@dataclass(frozen=True, slots=True)
class Layout:
    """How passes are laid out: ``packed`` side by side, positions counted from ``first_position``; else padded.

    ``attention`` is transformers' name of the attention that runs.
    """

    packed: bool
    attention: str
    first_position: int = 0


@dataclass(slots=True)
class Encoder:
    """A loaded module and how to run it."""

    module: torch.nn.Module
    layout: Layout
    device: str
    takes: frozenset[str]

    @property
    def bytes(self) -> int:
        """Bytes of its parameters and buffers."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def hidden(self, texts: Sequence[Sequence[int]], one: Pass) -> list[torch.Tensor]:
        """The last hidden states of one pass: one tensor ``[count, length, width]`` a group of equal length."""
        run = self._packed if self.layout.packed else self._padded
        return run([texts[row] for row in one.rows], one)

    def _packed(self, rows: Sequence[Sequence[int]], one: Pass) -> list[torch.Tensor]:
        ids = np.fromiter((token for row in rows for token in row), dtype=np.int64, count=one.tokens)
        first = self.layout.first_position
        positions = np.concatenate(
            [np.tile(np.arange(first, first + group.length), group.count) for group in one.groups]
        )
        inputs = {"input_ids": self._tensor(ids[None]), "position_ids": self._tensor(positions[None])}
        with layout(one.groups):
            states = self._forward(inputs)[0]
        return [states[group.start : group.end].view(group.count, group.length, -1) for group in one.groups]

    def _padded(self, rows: Sequence[Sequence[int]], one: Pass) -> list[torch.Tensor]:
        ids = np.full((len(rows), one.width), _pad_id(self.module), dtype=np.int64)
        mask = np.zeros((len(rows), one.width), dtype=np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
            mask[place, : len(row)] = 1
        states = self._forward({"input_ids": self._tensor(ids), "attention_mask": self._tensor(mask)})
        found, place = [], 0
        for group in one.groups:
            found.append(states[place : place + group.count, : group.length])
            place += group.count
        return found

    def partly_seen(self, rows: Sequence[Sequence[int]], seen: Sequence[int], attention: str) -> torch.Tensor:
        """The last hidden states ``[count, length, width]`` of texts of one length.

        Args:
            rows: the texts.
            seen: of each text, how many of its first tokens any token of it attends to.
            attention: transformers' name of an attention that takes a mask.
        """
        ids = np.array(rows, dtype=np.int64)
        mask = (np.arange(ids.shape[1]) < np.array(seen)[:, None]).astype(np.int64)
        self.module.set_attn_implementation(attention)  # type: ignore[operator]  # transformers' own
        try:
            return self._forward({"input_ids": self._tensor(ids), "attention_mask": self._tensor(mask)})
        finally:
            self.module.set_attn_implementation(self.layout.attention)  # type: ignore[operator]

    def _forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if "token_type_ids" in self.takes:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        with torch.inference_mode():
            states: torch.Tensor = self.module(**inputs).last_hidden_state
        return states

    def _tensor(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


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
        for owner in module.modules():
            for name, tensor in owner._parameters.items():  # noqa: SLF001 - setattr would check and copy
                if tensor is not None and tensor.device != _META:
                    owner._parameters[name] = _without_data(tensor)  # noqa: SLF001
        if architecture:
            self._free[architecture].append(module)


def has_own_buffers(module: torch.nn.Module) -> bool:
    """Whether its files hold more than parameters: a skeleton of it would keep another model's numbers."""
    return bool(module.state_dict().keys() - dict(module.named_parameters(remove_duplicate=False)).keys())


def _without_data(parameter: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty_like(parameter, device=_META), requires_grad=False)


def load_module(files: Path, auto: Any = AutoModel, *, formats: Sequence[str] = ("safetensors",)) -> torch.nn.Module:
    """Load through transformers, in float32, without running code from the folder.

    Args:
        files: the folder.
        auto: transformers' class to load with.
        formats: what the weights may be in; pickle is read as numbers only, if it is among these.

    Raises:
        ModelLoadError: weights are missing, which transformers would make up at random.
    """
    module, found = auto.from_pretrained(
        files,
        dtype=torch.float32,
        use_safetensors=None if "pickle" in formats else True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = sorted(name for name in found["missing_keys"] if "pooler" not in name.split("."))
    if missing:  # a pooler may be: nothing here reads what it makes
        raise refusal(f"its weights lack {missing[0]} and {len(missing) - 1} others that the model needs")
    for parameter in module.parameters():
        parameter.requires_grad_(requires_grad=False)
    return module.eval()  # type: ignore[no-any-return]  # transformers is untyped


def blank_module(files: Path) -> torch.nn.Module:
    """A module as ``load_module`` makes it, but for its weights, which are not even initialised."""
    config = AutoConfig.from_pretrained(files, local_files_only=True, trust_remote_code=False)
    with no_init_weights():
        made: Any = AutoModel.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    module: torch.nn.Module = made.requires_grad_(requires_grad=False).eval()
    return module


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Change the number format of a module's parameters, in place, and return it.

    Not of its buffers, as ``Module.to`` would: rotary frequencies rounded to bfloat16 lose the places of long texts.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return module


def hang_in(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> bool:
    """Give a skeleton these weights, by name; false, and nothing done, if they do not cover it."""
    wanted = dict(module.named_parameters(remove_duplicate=False))
    if not wanted.keys() <= weights.keys():
        return False
    if any(weights[name].shape != parameter.shape for name, parameter in wanted.items()):
        return False
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name in owner._parameters:  # noqa: SLF001 - setattr would check and copy
            if f"{prefix}{name}" in wanted:
                owner._parameters[name] = torch.nn.Parameter(weights[f"{prefix}{name}"], requires_grad=False)  # noqa: SLF001
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


def encoder(module: torch.nn.Module, chosen: Layout, device: str) -> Encoder:
    """Make a module ready to run in a layout."""
    module.set_attn_implementation(chosen.attention)  # type: ignore[operator]  # transformers' own
    takes = frozenset(inspect.signature(module.forward).parameters)
    types = getattr(module.config, "type_vocab_size", 0)
    return Encoder(module.to(device), chosen, device, takes if types else takes - {"token_type_ids"})


def layouts(module: torch.nn.Module, kind: str) -> list[Layout]:
    """The packed layouts worth trying on a kind of device; which is right, if any, is found by comparing."""
    if kind != "cpu":  # a call for each length would leave a GPU waiting for launches; padded, one call serves all
        return []
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return []
    after_padding = _pad_id(module) + 1  # how RoBERTa and its kin count
    return [Layout(packed=True, attention=NAME, first_position=first) for first in (0, after_padding)]


def plain_layout(module: torch.nn.Module) -> Layout:
    """Padded, with the attention that transformers itself chose: what every other layout is compared with."""
    config: Any = module.config
    return Layout(packed=False, attention=str(config._attn_implementation))  # noqa: SLF001 - it has no public name


def attention_window(module: torch.nn.Module) -> int | None:
    """How many tokens away some of its layers see, as its config says; None if all see the whole text."""
    window = getattr(module.config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def _pad_id(module: torch.nn.Module) -> int:
    return int(getattr(module.config, "pad_token_id", None) or 0)
