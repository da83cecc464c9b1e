"""Pools over the wire: what a client asks for, and what it is told."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec

from common.errors import RequestError
from config_db.access import DEFAULT_LEASE_S, PoolSpec
from config_db.spec import WRITTEN_NAME
from tasks.live_workers import WorkerView
from tasks.names import SHARED_POOL
from webapp.wire.results import ErrorBody

BUNDLE: Final = "default"
"""The only one there is."""
PoolName = Annotated[str, msgspec.Meta(pattern=WRITTEN_NAME, max_length=64)]
WorkerCount = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=1, le=86_400)]


class PoolBody(msgspec.Struct):
    """A pool that is asked for. ``gpus`` are workers by machine profile; ``gpu_caps`` bounds them from above.

    ``queue_pool`` and ``bundle`` are ``default`` if given; models are pinned in their own specs, not here.
    """

    name: PoolName
    gpus: Annotated[dict[PoolName, WorkerCount], msgspec.Meta(min_length=1, max_length=64)] | None = None
    gpu_caps: dict[PoolName, Annotated[int, msgspec.Meta(ge=0)]] | None = None
    queue_pool: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    bundle: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    minimum_worker_count: Annotated[int, msgspec.Meta(ge=0, le=10_000)] | None = None
    pinned_models: Annotated[list[str], msgspec.Meta(max_length=100)] | None = None
    ttl_seconds: LeaseSeconds = DEFAULT_LEASE_S


class PoolWorker(msgspec.Struct):
    """A worker that serves the pool now."""

    name: str
    url: str
    gpu: str
    bundle: str = BUNDLE


class PoolShape(msgspec.Struct):
    """What was asked for."""

    name: str
    gpus: dict[str, int]
    gpu_caps: dict[str, int]
    minimum_worker_count: int
    bundle: str = BUNDLE
    queue_pool: str = SHARED_POOL
    pinned_models: list[str] = []


class PoolStatus(msgspec.Struct):
    """What is there: instants in seconds since 1970; those of a lease are null for a pool that stays."""

    state: Literal["pending", "active"]
    assigned_workers: list[PoolWorker]
    created_at: float | None
    last_renewed: float | None
    expires_at: float | None


class PoolAnswer(msgspec.Struct):
    """One pool."""

    name: str
    spec: PoolShape
    status: PoolStatus


class PoolList(msgspec.Struct):
    """All pools that the caller may use."""

    pools: list[PoolAnswer]


class PoolProblem(msgspec.Struct):
    """An error, twice, for two kinds of clients."""

    error: ErrorBody
    detail: ErrorBody


class PoolDeleted(msgspec.Struct):
    """The pool is no more, and its workers go back."""

    name: str
    deleted: bool = True


def wanted_profiles(body: PoolBody, *, own_profile: str) -> dict[str, int]:
    """How many workers of each machine profile are asked for; one of the farm's own if nothing is said.

    Raises:
        RequestError: the body asks for what pools are not here; ``param`` names the field.
    """
    least = body.minimum_worker_count or 0
    wanted = {name.lower(): count for name, count in (body.gpus or {own_profile: max(1, least)}).items()}
    if least > sum(wanted.values()):
        raise RequestError("this is more workers than gpus add up to", param="minimum_worker_count")
    for name, cap in (body.gpu_caps or {}).items():
        if cap < wanted.get(name.lower(), 0):
            raise RequestError(f"of {name!r} gpus asks for more than this cap", param="gpu_caps")
    for field, value in (("bundle", body.bundle), ("queue_pool", body.queue_pool)):
        if value not in (None, "default"):
            raise RequestError(f"{field} is 'default' or nothing: there is no other here", param=field)
    if body.pinned_models:
        raise RequestError(
            "a pool pins no models here: say placement.pinned in the model's spec", param="pinned_models"
        )
    return wanted


def pool_answer(name: str, spec: PoolSpec, workers: Sequence[WorkerView]) -> PoolAnswer:
    """A pool and the ready workers that serve it."""
    lease_s = spec.lease_s if spec.is_leased else 0.0
    expires_at = spec.expires_at.timestamp() if spec.expires_at is not None else None
    return PoolAnswer(
        name,
        PoolShape(name, dict(spec.machine_profiles), {}, sum(spec.machine_profiles.values())),
        PoolStatus(
            state="active" if _has_all(spec.machine_profiles, workers) else "pending",
            assigned_workers=[PoolWorker(worker.node, "", worker.machine_profile) for worker in workers],
            created_at=spec.created_at.timestamp() if spec.created_at is not None else None,
            last_renewed=expires_at - lease_s if expires_at is not None else None,
            expires_at=expires_at,
        ),
    )


def _has_all(wanted: Mapping[str, int], workers: Sequence[WorkerView]) -> bool:
    profiles = [worker.machine_profile for worker in workers]
    return all(profiles.count(profile) >= count for profile, count in wanted.items())
