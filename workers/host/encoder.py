"""A transformers encoder as families run it: a module as it is loaded, and the passes over it."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from workers.host.attention import NAME, layout
from workers.host.families.dense_folder import refusal
from workers.host.packing import Pass

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
        return bytes_of(self.module)

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

    def partly_seen(
        self, texts: Sequence[Sequence[int]], rows: Sequence[int], seen: Sequence[int], attention: str
    ) -> torch.Tensor:
        """The last hidden states ``[count, length, width]`` of some texts, which are of one length.

        Args:
            texts: those of the micro-batch.
            rows: which of them.
            seen: of each, how many of its first tokens any token of it attends to.
            attention: transformers' name of an attention that takes a mask.
        """
        ids = np.array([texts[row] for row in rows], dtype=np.int64)
        mask = (np.arange(ids.shape[1]) < np.array(seen)[:, None]).astype(np.int64)
        set_attention(self.module, attention)
        try:
            return self._forward({"input_ids": self._tensor(ids), "attention_mask": self._tensor(mask)})
        finally:
            set_attention(self.module, self.layout.attention)

    def _forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if "token_type_ids" in self.takes:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        with torch.inference_mode():
            states: torch.Tensor = self.module(**inputs).last_hidden_state
        return states

    def _tensor(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


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


def bytes_of(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers; what is shared counts once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def cast(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Change the number format of a module's parameters, in place, and return it.

    Not of its buffers, as ``Module.to`` would: rotary frequencies rounded to bfloat16 lose the places of long texts.
    """
    for parameter, numbers in in_format(module, dtype):
        parameter.data = numbers
    return module


def in_format(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter of a module that holds floats, and its numbers in another format."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            yield parameter, parameter.data.to(dtype)


def set_attention(module: Any, name: str) -> None:
    """Let a module of transformers' run another attention, by its name there."""
    module.set_attn_implementation(name)


def encoder(module: torch.nn.Module, chosen: Layout, device: str) -> Encoder:
    """Make a module ready to run in a layout."""
    set_attention(module, chosen.attention)
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
