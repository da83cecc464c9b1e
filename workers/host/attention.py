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
"""From so many tokens in a block the products pay for their calls."""
BLOCK_TOKENS: Final = 384
"""A block of so many tokens takes no further length: what is filled up costs as much by then as calls of its own."""
LANES: Final = 32
"""bfloat16 numbers in a vector register: torch's softmax falls to a scalar loop on what is left of a row."""
_UNKNOWN: Final = ("position_bias", "softcap", "s_aux", "head_mask")
"""What else would change the scores, as transformers' models hand it over."""


class _Block:
    """Texts of a pass that fill as many whole vector registers, for products over all of them at once.

    Each text has as many places in the block as its longest has tokens, and what fills them up to ``width`` as keys;
    places without a token are unseen.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.tokens = slice(groups[0].start, groups[-1].end)
        self._longest, self._width = groups[-1].length, _filled(groups[-1].length)
        lengths = torch.tensor([group.length for group in groups for _ in range(group.count)])
        is_token = torch.arange(self._width) < lengths[:, None]
        self._unseen = ~is_token if len(groups) > 1 else ~is_token[:1]
        firsts = self.tokens.start + lengths.cumsum(0) - lengths
        key_of = firsts[:, None].repeat(1, self._width)  # filled with its own: what is no number in a text stays in it
        key_of[is_token] = torch.arange(self.tokens.start, self.tokens.stop)
        self._key_of = key_of.flatten()
        self._query_of = key_of[:, : self._longest].flatten()
        self._place_of = is_token[:, : self._longest].flatten().nonzero()[:, 0]
        self._biases: dict[tuple[int, torch.dtype, int | None, bool], torch.Tensor] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        *,
        causal: bool,
    ) -> torch.Tensor:
        """From ``[heads, tokens of the pass, width]`` each, ``[tokens of the block, heads, width]``."""
        heads, _, width = query.shape
        queries = query.index_select(1, self._query_of).view(-1, self._longest, width)
        keys, values = (part.index_select(1, self._key_of).view(-1, self._width, width) for part in (key, value))
        bias = self._bias(heads, query.dtype, window, causal=causal)
        seen = bias.expand(len(queries), self._longest, -1)
        scores = torch.baddbmm(seen, queries, keys.transpose(1, 2), alpha=scale)
        mixed = torch.bmm(scores.softmax(-1), values)
        return mixed.view(heads, -1, width).index_select(1, self._place_of).transpose(0, 1)

    def _bias(self, heads: int, dtype: torch.dtype, window: int | None, *, causal: bool) -> torch.Tensor:
        """What is added to the scores: one for all layers that ask so.

        ``[heads * texts, queries or 1, keys]``, of texts of one length ``[1, queries or 1, keys]``.
        """
        asked = (heads, dtype, window, causal)
        if asked not in self._biases:
            unseen, hidden = self._unseen[:, None], _hidden(self._width, window, causal=causal)
            if hidden is not None:
                unseen = unseen | hidden[: self._longest]
            bias = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
            self._biases[asked] = bias if len(bias) == 1 else bias.repeat(heads, 1, 1)
        return self._biases[asked]


class _Layout(local):
    groups: Sequence[Group] = ()
    parted: tuple[Sequence[Group], Sequence[_Block]] | None = None


_layout = _Layout()


@contextmanager
def layout(groups: Sequence[Group]) -> Iterator[None]:
    """Let attention in the block, in this thread, see these groups."""
    _layout.groups = groups
    try:
        yield
    finally:
        _layout.groups, _layout.parted = (), None


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
    alone, blocks = _parted(query)
    for block in blocks:
        mixed[block.tokens] = block.attend(query[0], key[0], value[0], scale, window, causal=causal)
    for group in alone:
        texts = slice(group.start, group.end)
        shape = (heads, group.count, group.length, width)
        q, k, v = (part[0, :, texts].reshape(shape).transpose(0, 1) for part in (query, key, value))
        hidden = _hidden(group.length, window, causal=causal)
        mask = None if hidden is None else ~hidden.to(query.device)
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        mixed[texts] = found.transpose(1, 2).reshape(-1, heads, width)
    return mixed.unsqueeze(0), None


def _parted(query: torch.Tensor) -> tuple[Sequence[Group], Sequence[_Block]]:
    """Which groups of the pass torch's fused kernel runs, each alone, and which stand together in blocks.

    In bfloat16 on a CPU that kernel takes 1.1 to 2.3 times as long as plain products, as measured, and a call of its
    own for each length.
    """
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return _layout.groups, ()
    if _layout.parted is None:
        _layout.parted = _part(_layout.groups)
    return _layout.parted


def _part(groups: Sequence[Group]) -> tuple[list[Group], list[_Block]]:
    together: list[list[Group]] = []
    for group in groups:
        last = together[-1] if together else []
        is_small = group.end - group.start < BLOCK_TOKENS
        if last and is_small and _tokens(last) < BLOCK_TOKENS and _filled(last[0].length) == _filled(group.length):
            last.append(group)
        else:
            together.append([group])
    alone: list[Group] = []
    blocks: list[_Block] = []
    for some in together:
        if some[0].length <= PRODUCT_LENGTH and _tokens(some) >= PRODUCT_TOKENS:
            blocks.append(_Block(some))
        else:
            alone += some
    return alone, blocks


def _tokens(groups: Sequence[Group]) -> int:
    """Tokens of groups that stand side by side."""
    return groups[-1].end - groups[0].start


def _filled(length: int) -> int:
    """A length filled up to whole vector registers."""
    return -(-length // LANES) * LANES


def _hidden(length: int, window: int | None, *, causal: bool) -> torch.Tensor | None:
    """Which keys a query does not see, bool ``[length, length]``; None where it sees its whole text.

    ``window`` is as transformers hands it over: a query sees what is less than so many tokens away.
    """
    if not causal and (window is None or length <= window):
        return None
    places = torch.arange(length)
    ahead = places[None, :] - places[:, None]
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    return hidden if window is None else hidden | (ahead.abs() >= window)


def _no_mask(*_: Any, **__: Any) -> None:
    """The layout takes the place of a mask."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
