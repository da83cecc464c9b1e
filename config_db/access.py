"""Who may use the farm, and which workers are set aside for whom: pools, tenants and API keys as validated specs."""

from datetime import datetime
from typing import Annotated, Final, Literal

import msgspec

from config_db.spec import END, LatencyClass, MachineProfile, Name, Positive, Text

Scope = Literal["infer", "jobs", "pools", "config", "admin"]

DEFAULT_TENANT: Final = "default"
"""Whoever names no other. It is there without a row of its own."""
DEFAULT_LEASE_S: Final = 1200.0
PoolName = MachineProfile
"""Both stand in the names of queues."""
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
Weight = Annotated[float, msgspec.Meta(gt=0, le=1_000_000)]
LeaseSeconds = Annotated[float, msgspec.Meta(gt=0, le=366 * 86_400)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}" + END)]
LATENCY_CLASSES: Final[tuple[LatencyClass, ...]] = ("interactive", "standard", "batch", "experiment")


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all specs here have in common."""


class PoolNamed(_Part, frozen=True, kw_only=True):
    """The name of a pool."""

    name: PoolName


class TenantNamed(_Part, frozen=True, kw_only=True):
    """The name of a tenant."""

    name: Name


class PoolSpec(_Part, frozen=True, kw_only=True):
    """Workers set aside under a name: so many of each machine profile, for one tenant or, without one, for all.

    A pool is held by a lease of ``lease_s`` seconds, which its client renews, until ``expires_at``; None: it is
    permanent. ``client`` says who made it.
    """

    machine_profiles: Annotated[dict[MachineProfile, Positive], msgspec.Meta(min_length=1)]
    tenant: Name | None = None
    lease_s: LeaseSeconds = DEFAULT_LEASE_S
    created_at: Instant | None = None
    expires_at: Instant | None = None
    client: Text | None = None

    @property
    def is_leased(self) -> bool:
        """Whether a client made it and holds it; otherwise it is the operator's."""
        return self.expires_at is not None

    def is_expired(self, at: datetime) -> bool:
        """Whether the lease has run out, so that the workers go back."""
        return self.expires_at is not None and self.expires_at <= at


class Quotas(_Part, frozen=True, kw_only=True):
    """Most that a tenant may have at once, in requests, or spend in a minute; None: no bound of its own.

    ``in_flight`` counts its open requests, waiting or running, ``queued`` those of one lane.
    """

    in_flight: Positive | None = None
    queued: Positive | None = None
    tokens_per_minute: Positive | None = None


class TenantSpec(_Part, frozen=True, kw_only=True):
    """One tenant: ``weight`` is its share of a busy farm against the others', ``latency_classes`` those it may use."""

    weight: Weight = 1.0
    quotas: Quotas = Quotas()
    latency_classes: Annotated[tuple[LatencyClass, ...], msgspec.Meta(min_length=1)] = LATENCY_CLASSES
    note: Text | None = None


class KeySpec(_Part, frozen=True, kw_only=True):
    """One API key, without its secret.

    A secret is 32 random bytes: nobody guesses one however fast the hash, so ``secret_sha256`` is a fast one. Slow
    hashes are for passwords, which are guessed, and would cost every request milliseconds. ``prefix`` is the public
    beginning of the key, for lists. ``latency_class`` is that of requests which name none.
    """

    tenant: Name
    secret_sha256: Sha256
    prefix: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    created_at: Instant
    scopes: Annotated[tuple[Scope, ...], msgspec.Meta(min_length=1)] = ("infer",)
    latency_class: LatencyClass = "interactive"
    expires_at: Instant | None = None
    revoked_at: Instant | None = None
    note: Text | None = None

    def is_usable(self, at: datetime) -> bool:
        """Whether it is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or at < self.expires_at)
