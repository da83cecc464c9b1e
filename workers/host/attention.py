"""Padding-free attention for transformers' encoders: texts stand side by side in one row and see only themselves.

Registered under ``NAME`` with transformers' own interfaces, so that no model is forked. The layout of the pass that
runs is set round each forward; one compute thread a host runs them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from workers.host.packing import Group

NAME: Final = "farm_packed"


class _Layout:
    groups: Sequence[Group] = ()


_layout = _Layout()


@contextmanager
def layout(groups: Sequence[Group]) -> Iterator[None]:
    """Let attention in the block see these groups."""
    _layout.groups = groups
    try:
        yield
    finally:
        _layout.groups = ()


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the layout says who sees whom
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - nothing is trained
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over ``[1, heads, tokens, width]`` each; returns ``[1, tokens, heads, width]``."""
    if options.get("sliding_window") is not None or getattr(module, "num_key_value_groups", 1) != 1:
        raise NotImplementedError("padding-free attention knows neither windows nor grouped heads")
    heads, tokens, width = query.shape[1:]
    mixed = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
    for group in _layout.groups:
        block = slice(group.start, group.end)
        shape = (heads, group.count, group.length, width)
        asked, known, carried = (part[0, :, block].reshape(shape).transpose(0, 1) for part in (query, key, value))
        seen = scaled_dot_product_attention(asked, known, carried, scale=scaling)
        mixed[block] = seen.transpose(1, 2).reshape(-1, heads, width)
    return mixed.unsqueeze(0), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout takes the place of a mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
