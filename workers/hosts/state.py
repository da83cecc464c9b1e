"""One host as the pool holds it, from being asked for until it is lost: its link, its board, and what it owes."""

from dataclasses import dataclass, field
from time import monotonic

from config_db.spec import ModelSpec
from workers.host.frames import Introduce, Ready
from workers.host.stages import Board
from workers.hosts.link import Link
from workers.hosts.protocol import HostView


@dataclass(slots=True, eq=False)
class HostState:
    """Written by the event loop's thread; the watchdog's thread reads it and notes for what it has killed.

    ``ready`` is what the host said of itself at its start; ``warming`` are the specs it loads before it is announced;
    ``outstanding`` maps the micro-batches it has to their ``hang_s``; ``introduced`` are specs as it knows them;
    ``status`` is how it ended, as the zygote says.
    """

    view: HostView
    device: str
    link: Link
    board: Board
    asked_at: float = field(default_factory=monotonic)
    ready: Ready | None = None
    outstanding: dict[int, float] = field(default_factory=dict)
    introduced: dict[str, ModelSpec] = field(default_factory=dict)
    spec_numbers: dict[str, int] = field(default_factory=dict)
    warming: set[str] = field(default_factory=set)
    is_announced: bool = False
    is_retiring: bool = False
    status: int | None = None
    killed_for: str | None = None

    def owe(self, batch: int, hang_s: float) -> None:
        """It has this micro-batch now."""
        self.outstanding[batch] = hang_s
        self.view.outstanding = len(self.outstanding)

    def settle(self, batch: int) -> None:
        """The micro-batch is answered."""
        del self.outstanding[batch]
        self.view.outstanding = len(self.outstanding)

    def introduce(self, spec: ModelSpec) -> None:
        """Send each spec once; afterwards its digest is enough, until what the digest leaves out changes."""
        known = self.introduced.get(spec.digest)
        if known is spec or (known is not None and known.placement == spec.placement):
            return
        number = self.spec_numbers.setdefault(spec.digest, len(self.spec_numbers) + 1)
        self.introduced[spec.digest] = spec
        self.link.write(Introduce(spec.digest, number, spec))

    @property
    def takes_work(self) -> bool:
        """Whether it may be given micro-batches."""
        return self.is_announced and not self.is_retiring and not self.link.is_closed

    def spec_of(self, number: int) -> ModelSpec | None:
        """The spec that the board names by this number; None if it names none."""
        return next((self.introduced[digest] for digest, known in self.spec_numbers.items() if known == number), None)
