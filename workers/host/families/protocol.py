"""What a kind of model must be able to do to be served: the protocol between the host and its families.

A family estimates and loads; a loaded model prepares (tokenises), runs and finishes. ``prepare`` runs in the host's
reader thread while the compute thread runs an earlier micro-batch, so it must not touch the device; ``run``, ``finish``
and ``close`` run in the compute thread. A raise in any of the three makes the host halve the micro-batch until the
culprit stands alone; a family that already knows which request is at fault answers it alone, as an error in ``finish``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from common.errors import FarmError
from config_db.spec import ModelSpec
from tasks.messages import Request
from workers.host.copies import Copies
from workers.host.host_memory import HostMemory

ItemResults: TypeAlias = bytes
"""A msgpack list, one result per item of a request."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model is loaded.

    ``name`` is torch's name of it (``cpu``, ``cuda:0``); ``pass_tokens`` is how many tokens one forward pass may hold:
    ``run`` sorts and packs to it, within the spec's own ``limits.max_batch_tokens``. ``copies`` is where weights may be
    kept as they run, ``host_memory`` what keeps them beside a GPU; a family may do without either.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    index: int = 0
    name: str = "cpu"
    pass_tokens: int = 2048
    copies: Copies | None = None
    host_memory: HostMemory | None = None


class Prepared(Protocol):
    """What ``prepare`` returns; opaque to the host but for the measured tokens of each request, in order."""

    @property
    def request_tokens(self) -> Sequence[int]:
        """Measured tokens of each request, in order; zero for one that will be answered with an error."""


class Model(Protocol):
    """One loaded model. One that takes adapters is ``Adaptable`` (``workers.host.families.adaptable``), too."""

    @property
    def bytes(self) -> int:
        """Device bytes it holds, measured; on CPU the bytes of its weights."""

    def prepare(self, operation: str, requests: Sequence[Request]) -> Prepared:
        """Check and tokenise a micro-batch; RequestError for what the model cannot read."""

    def run(self, prepared: Any) -> Any:
        """The forward passes."""

    def finish(self, prepared: Any, raw: Any) -> list[ItemResults | FarmError]:
        """One answer per request, in order: its item results (see ``results``), or its own error."""

    def close(self) -> None:
        """Give the memory back."""


@runtime_checkable
class Packable(Protocol):
    """A model that runs quicker with a second, packed form of its weights: worth its bytes if the model stays."""

    @property
    def packed_bytes(self) -> int:
        """Device bytes that ``pack`` takes; zero if there is nothing to pack."""

    def pack(self) -> bool:
        """Run on packed weights from now on, in the compute thread; false if that would be no quicker."""


class Family(Protocol):
    """One kind of model; made once per host, without arguments."""

    def estimate_bytes(self, spec: ModelSpec, files: Path) -> int:
        """Device bytes the model is going to need, told from its files; called before ``load``."""

    def load(self, spec: ModelSpec, files: Path, device: Device) -> Model:
        """Load the model from a resolved directory; ModelLoadError if it cannot be."""


class FamilyMaker(Protocol):
    """How the registry makes a family."""

    def __call__(self) -> Family:
        """The family."""
