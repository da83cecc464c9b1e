"""States of every token of a micro-batch, for families that answer with more than one pooled vector a text."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from config_db.spec import ModelSpec
from workers.host.encoder import Encoder, Layout, encoder, plain_layout, set_attention
from workers.host.families.adaptable import like
from workers.host.families.opening import Opening, whole
from workers.host.families.passes import pass_budget
from workers.host.families.protocol import Device
from workers.host.packing import Pass, plan


class TokenEncoder:
    """An encoder in the layout that was found for it.

    Args:
        module: the bare encoder, in its precision, as transformers loaded it.
        most_tokens: what one pass may hold.
    """

    def __init__(self, module: torch.nn.Module, layout: Layout, device: str, *, most_tokens: int) -> None:
        self._plain = plain_layout(module)
        self._encoder: Encoder = encoder(module, layout, device)
        self.pass_tokens = most_tokens

    @property
    def is_packed(self) -> bool:
        """Whether texts stand side by side, without padding."""
        return self._encoder.layout.packed

    def passes(self, lengths: Sequence[int], places: Sequence[int] | None = None) -> list[Pass]:
        """The passes for texts of these lengths, or for those of them that stand at ``places``."""
        return plan(lengths, pass_tokens=self.pass_tokens, padded=not self.is_packed, places=places)

    def states(self, ids: Sequence[Sequence[int]], one: Pass) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """The states of a pass, ``[count, length, width]``, with the places of these texts; real tokens only."""
        first = 0
        for group, states in zip(one.groups, self._encoder.hidden(ids, one), strict=True):
            yield one.rows[first : first + group.count], states
            first += group.count

    def partly_seen(self, ids: Sequence[Sequence[int]], places: Sequence[int], seen: Sequence[int]) -> torch.Tensor:
        """States ``[count, length, width]`` of texts of equal length, of which only the first tokens are seen."""
        return self._encoder.partly_seen(ids, places, seen, self._plain.attention)

    def on(self, module: torch.nn.Module) -> "TokenEncoder":
        """One that runs a module with adapters in the same way."""
        from workers.host.adapted_encoder import with_adapters

        return like(self, _encoder=with_adapters(self._encoder, module))


def vocabulary_size(module: torch.nn.Module) -> int:
    """Words that the model knows."""
    config: Any = module.config
    return int(config.vocab_size)


def opening(
    spec: ModelSpec,
    files: Path,
    weights: Path,
    device: Device,
    *,
    base: Callable[[torch.nn.Module], torch.nn.Module] = whole,
    vectors: Callable[[torch.nn.Module, TokenEncoder, Sequence[str]], torch.Tensor],
) -> Opening:
    """How a folder is opened, of which is compared what the family makes of texts.

    Args:
        spec: of the model.
        files: its folder.
        weights: where in it they lie.
        device: where it is tried.
        base: the bare encoder in a module.
        vectors: what the family makes of texts, ``[N, D]``, with this module run by this encoder.
    """

    def run(module: torch.nn.Module, layout: Layout, texts: Sequence[str]) -> torch.Tensor:
        bare = base(module.to(device.name))
        attention = plain_layout(bare).attention
        try:
            return vectors(module, token_encoder(spec, bare, layout, device), texts)
        finally:
            set_attention(bare, attention)

    return Opening(spec, files, weights, run, spec.trust.formats)


def token_encoder(spec: ModelSpec, base: torch.nn.Module, layout: Layout, device: Device) -> TokenEncoder:
    """A bare encoder as it runs on a device."""
    return TokenEncoder(base, layout, device.name, most_tokens=pass_budget(spec, device))
