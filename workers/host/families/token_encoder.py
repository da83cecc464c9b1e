"""States of every token of a micro-batch, for families that answer with more than one pooled vector a text.

The first load of a folder finds, by comparing what the family makes of a few texts with a plain padded float32 run,
whether texts may stand side by side without padding, and in which precision.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Protocol, TypeVar

import torch

from common.logs import get_logger
from config_db.spec import ModelSpec
from workers.host import devices, precision
from workers.host.encoder import Encoder, Layout, attention_window, cast, encoder, layouts, plain_layout
from workers.host.families.protocol import Device
from workers.host.families.text_folder import content_key
from workers.host.packing import Pass, plan

log = get_logger("host")

EQUAL: Final = 0.9999
"""Cosine between a packed and a padded run that says they compute the same thing."""
KEPT_FOLDERS: Final = 256
CPU_PASS_TOKENS: Final = 1024
"""A larger pass leaves the cache of a core."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a folder's model is run."""

    layout: Layout
    precision: str


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

    def passes(self, lengths: Sequence[int]) -> list[Pass]:
        """The passes for texts of these lengths."""
        return plan(lengths, pass_tokens=self.pass_tokens, padded=not self.is_packed)

    def states(self, ids: Sequence[Sequence[int]], one: Pass) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """The states of a pass, ``[count, length, width]``, with the places of these texts; real tokens only."""
        first = 0
        for group, states in zip(one.groups, self._encoder.hidden(ids, one), strict=True):
            yield one.rows[first : first + group.count], states
            first += group.count

    def partly_seen(self, ids: Sequence[Sequence[int]], seen: Sequence[int]) -> torch.Tensor:
        """States ``[count, length, width]`` of texts of equal length, of which only the first tokens are seen."""
        return self._encoder.partly_seen(ids, seen, self._plain.attention)


def vocabulary_size(module: torch.nn.Module) -> int:
    """Words that the model knows."""
    config: Any = module.config
    return int(config.vocab_size)


def pass_budget(spec: ModelSpec, device: Device) -> int:
    """Tokens of one pass, within the spec's own limit."""
    most = min(device.pass_tokens, CPU_PASS_TOKENS) if device.kind == "cpu" else device.pass_tokens
    return min(spec.limits.max_batch_tokens or most, most)


class Kept(Protocol):
    """What a family keeps of a folder when its model leaves."""

    verdict: Verdict | None


K = TypeVar("K", bound=Kept)


class KeptFolders(Generic[K]):
    """What outlives the eviction of models, by folder and spec: everything but weights.

    Args:
        read: reads a folder.
    """

    def __init__(self, read: Callable[[ModelSpec, Path], K]) -> None:
        self._read = read
        self._kept: OrderedDict[tuple[str, str], K] = OrderedDict()

    def recall(self, spec: ModelSpec, files: Path) -> K:
        """What is kept of the folder, read first if nothing is."""
        key = content_key(spec, files)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = self._read(spec, files)
        self._kept.move_to_end(key)
        if len(self._kept) > KEPT_FOLDERS:
            self._kept.popitem(last=False)
        return kept

    def estimate_bytes(self, spec: ModelSpec, files: Path, weights: Iterable[Path]) -> int:
        """The size of the weight files, halved where the model is known to run in half precision."""
        size = sum(path.stat().st_size for path in weights)
        kept = self._kept.get(content_key(spec, files))
        name = spec.precision if kept is None or kept.verdict is None else kept.verdict.precision
        return size // 2 if name in ("bfloat16", "float16") else size


def open_encoder(
    spec: ModelSpec,
    device: Device,
    kept: Kept,
    *,
    load: Callable[[], torch.nn.Module],
    base: Callable[[torch.nn.Module], torch.nn.Module],
    vectors: Callable[[torch.nn.Module, TokenEncoder, Sequence[str]], torch.Tensor],
) -> tuple[torch.nn.Module, TokenEncoder]:
    """The loaded module and the encoder in it, as it runs best, which the first time is found out (see ``_Trial``)."""
    if kept.verdict is None:
        kept.verdict, module = _Trial(spec, device, load=load, base=base, vectors=vectors).judge()
    else:
        module = cast(load(), precision.DTYPES[kept.verdict.precision])
    module = module.to(device.name)
    return module, TokenEncoder(base(module), kept.verdict.layout, device.name, most_tokens=pass_budget(spec, device))


class _Trial:
    """The first run of a folder.

    Args:
        load: loads the whole module, in float32.
        base: the bare encoder in it.
        vectors: what the family makes of texts, ``[N, D]``, with this module run by this encoder.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: Device,
        *,
        load: Callable[[], torch.nn.Module],
        base: Callable[[torch.nn.Module], torch.nn.Module],
        vectors: Callable[[torch.nn.Module, TokenEncoder, Sequence[str]], torch.Tensor],
    ) -> None:
        self._spec = spec
        self._device = device
        self._load = load
        self._base = base
        self._vectors = vectors

    def judge(self) -> tuple[Verdict, torch.nn.Module]:
        """The quickest layout and precision whose vectors are those of the plain run, and the module in them."""
        module = self._load()
        padded = plain_layout(self._base(module))
        tried_layouts = layouts(self._base(module), self._device.kind)
        plain = self._run(module, padded)
        chosen = next((one for one in tried_layouts if self._cosine(module, one, plain) >= EQUAL), padded)
        module, name = self._precise(module, chosen, plain)
        log.info("model_judged", model=self._spec.id, packed=chosen.packed, precision=name)
        return Verdict(chosen, name), module

    def _precise(self, module: torch.nn.Module, layout: Layout, plain: torch.Tensor) -> tuple[torch.nn.Module, str]:
        """The module in the lowest precision that is good enough."""
        *tried, last = precision.candidates(self._spec.precision, self._device)
        for name in tried:
            cosine = self._cosine(cast(module, precision.DTYPES[name]), layout, plain)
            if cosine >= precision.SAME:
                return module, str(name)
            log.warning("precision_refused", model=self._spec.id, precision=name, cosine=round(cosine, 6))
            module = self._load()
        return cast(module, precision.DTYPES[last]), str(last)

    def _cosine(self, module: torch.nn.Module, layout: Layout, plain: torch.Tensor) -> float:
        try:
            return precision.worst_cosine(self._run(module, layout), plain)
        except Exception as error:
            if devices.is_out_of_memory(error) or devices.is_device_lost(error):
                raise  # says nothing about the layout
            log.debug("layout_refused", model=self._spec.id, packed=layout.packed, error=repr(error)[:200])
            return -1.0

    def _run(self, module: torch.nn.Module, layout: Layout) -> torch.Tensor:
        base = self._base(module.to(self._device.name))
        attention = plain_layout(base).attention
        try:
            runner = TokenEncoder(base, layout, self._device.name, most_tokens=pass_budget(self._spec, self._device))
            return self._vectors(module, runner, precision.check_texts(attention_window(base)))
        finally:
            base.set_attn_implementation(attention)  # type: ignore[operator]  # transformers' own
