"""Padding-free attention for transformers' encoders: texts stand side by side in one row and see only themselves.

Registered under ``NAME`` with transformers' own interfaces, so that no model is forked. The layout of a pass is set
round its forward, for the thread that runs it: a host computes in one thread and tries newly loaded models in another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import local
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from workers.host.packing import Group

NAME: Final = "farm_packed"
PRODUCT_LENGTH: Final = 512
"""Up to this length the scores of a text are laid out whole; they grow with its square."""
PRODUCT_TOKENS: Final = 64
"""From so many tokens in a group the products pay for their calls."""
LANES: Final = 32
"""bfloat16 numbers in a vector register: torch's softmax falls to a scalar loop on what is left of a row."""
_UNKNOWN: Final = ("position_bias", "softcap", "s_aux", "head_mask")
"""What else would change the scores, as transformers' models hand it over."""


class _Layout(local):
    groups: Sequence[Group] = ()


_layout = _Layout()


@contextmanager
def layout(groups: Sequence[Group]) -> Iterator[None]:
    """Let attention in the block, in this thread, see these groups."""
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
    unknown = [name for name in _UNKNOWN if options.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"padding-free attention does not know {unknown[0]}")
    heads, tokens, width = query.shape[1:]
    if key.shape[1] != heads:
        key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    scale = width**-0.5 if scaling is None else scaling
    window = options.get("sliding_window")
    asked_causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if asked_causal is None else asked_causal)
    mixed = torch.empty(tokens, heads, width, dtype=query.dtype, device=query.device)
    for group in _layout.groups:
        block = slice(group.start, group.end)
        shape = (heads, group.count, group.length, width)
        texts = [part[0, :, block].reshape(shape).transpose(0, 1) for part in (query, key, value)]
        hidden = _hidden(group.length, window, query.device, causal=causal)
        attend = _by_products if _has_slow_kernel(query, group) else _by_kernel
        mixed[block] = attend(texts[0], texts[1], texts[2], scale, hidden).transpose(1, 2).reshape(-1, heads, width)
    return mixed.unsqueeze(0), None


def _has_slow_kernel(query: torch.Tensor, group: Group) -> bool:
    """Whether plain products are quicker than torch's fused kernel: in bfloat16 on CPU, by 1.1 to 2.3 as measured."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    return group.length <= PRODUCT_LENGTH and group.length * group.count >= PRODUCT_TOKENS


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> torch.Tensor:
    mask = None if hidden is None else ~hidden
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, hidden: torch.Tensor | None
) -> torch.Tensor:
    """The same by two batched products; keys are filled up to whole vector registers, unseen."""
    count, heads, length, width = query.shape
    filled = -(-length // LANES) * LANES
    keys, values = (_filled(part, filled) for part in (key, value))
    bias = query.new_zeros(1 if hidden is None else length, filled)
    bias[:, length:] = -torch.inf
    if hidden is not None:
        bias[:, :length].masked_fill_(hidden, -torch.inf)
    scores = torch.baddbmm(
        bias.expand(count * heads, length, filled),
        query.reshape(count * heads, length, width),
        keys.transpose(1, 2),
        alpha=scale,
    )
    return torch.bmm(scores.softmax(-1), values).view(count, heads, length, width)


def _filled(part: torch.Tensor, length: int) -> torch.Tensor:
    """``[count * heads, length, width]``, with zeros after the real tokens."""
    count, heads, tokens, width = part.shape
    whole = part.new_empty(count, heads, length, width)
    whole[:, :, :tokens] = part
    whole[:, :, tokens:] = 0
    return whole.view(count * heads, length, width)


def _hidden(length: int, window: int | None, device: torch.device, *, causal: bool) -> torch.Tensor | None:
    """Which keys a query does not see, bool ``[length, length]``; None where it sees its whole text.

    ``window`` is as transformers hands it over: a query sees what is less than so many tokens away.
    """
    if not causal and (window is None or length <= window):
        return None
    places = torch.arange(length, device=device)
    ahead = places[None, :] - places[:, None]
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    return hidden if window is None else hidden | (ahead.abs() >= window)


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout takes the place of a mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
