"""Which worker serves which pool: a pure function of the pools and the live workers, the same wherever it is computed.

Rendezvous hashing: in each pool every worker has a rank of its own, and the highest serve it. Pools choose one after
the other, the oldest first, from what those before have left, so no worker is counted twice. A worker that dies or
comes moves nobody but whom its place goes to: one worker of its machine profile a pool, at most.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final

from config_db.access import PoolSpec

_BEFORE_ALL: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A live worker that pools may take. ``node`` outlives a restart of its process, so it comes back to its place."""

    incarnation: str
    node: str
    machine_profile: str


def assign(pools: Mapping[str, PoolSpec], workers: Iterable[Candidate]) -> dict[str, str]:
    """The pool of every worker that is reserved, by incarnation; those left out stay shared."""
    free: dict[str, set[Candidate]] = {}
    for worker in workers:
        free.setdefault(worker.machine_profile, set()).add(worker)
    assigned: dict[str, str] = {}
    for name in sorted(pools, key=lambda name: (pools[name].created_at or _BEFORE_ALL, name)):
        for machine_profile, wanted in pools[name].machine_profiles.items():
            left = free.get(machine_profile, set())
            taken = sorted(left, key=lambda worker: (_rank(name, worker), worker.incarnation), reverse=True)[:wanted]
            left.difference_update(taken)
            assigned.update((worker.incarnation, name) for worker in taken)
    return assigned


def _rank(pool: str, worker: Candidate) -> bytes:
    return sha256(f"{pool}\n{worker.node}".encode()).digest()
