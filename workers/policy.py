"""What an operator may bound or weigh otherwise: micro-batches, hosts that hang, and whose turn it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of one micro-batch. A single request beyond them runs as a batch of its own."""

    max_items: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Bounds of a micro-batch and of a hanging host."""

    max_items: int
    max_tokens: int
    hang_floor_s: float
    hang_unmeasured_s: float

    def hang_s(self, expected_s: float | None) -> float:
        """When a micro-batch hangs: at the floor or ten times what it should last, the later; None: never measured."""
        return self.hang_unmeasured_s if expected_s is None else max(self.hang_floor_s, 10 * expected_s)


@dataclass(frozen=True, slots=True)
class Policy:
    """What an operator may want to weigh differently.

    Attributes:
        patience: a request for an absent model is overdue after this many of the model's load times.
        load_share: the share of time that loading may take while resident work waits.
        foreground_load_s: a model that loads longer is loaded in the background while resident work waits.
        unmeasured_load_s: what a first load is taken to last.
        lower_every: of this many picks one starts at a lower lane, so that every lane moves.
        gather_s: where hosts share the cores they compute on, a batch that lasts less waits as long for company while
            one of its key runs, once half of the hosts compute: a pass costs a few milliseconds however few tokens it
            has, and the other cores are wanted by the rest of the farm. 0: never.
        shared_s: while works of more than one tenant or lane arrive, a batch lasts no longer than this if it can be cut
            so short, and none is prepared behind one that lasts half as long: whoever asks for little waits for both.
        tenant_weights: shares of tenants that compete in a lane; 1 unless named.
    """

    patience: float = 2.0
    load_share: float = 0.25
    foreground_load_s: float = 1.0
    unmeasured_load_s: float = 0.5
    lower_every: int = 8
    gather_s: float = 0.0
    shared_s: float = 0.04
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
