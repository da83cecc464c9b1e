"""What admission holds the current caller's request to: the limits of the model and the quotas of the tenant."""

from config_db.access import DEFAULT_TENANT, TenantSpec
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec
from tasks.bounds import Bounds
from webapp.farm import Farm

_PLAIN = TenantSpec()


def tenant_of(served: Snapshot, name: str) -> TenantSpec:
    """A tenant's spec; one that the config DB does not know, as an issuer of tokens may name, is a plain one."""
    return served.tenants.get(name, _PLAIN)


def bounds_of(farm: Farm, spec: ModelSpec, tenant: str) -> Bounds:
    """Of the snapshot as it is now, so that a new epoch holds for the next request.

    ``max_concurrency`` is added to a model's ``queue_limit``, as what runs is counted with what waits. Where there are
    several tenants, each lane holds a bounded number of each one's requests, so that none stands in everybody's way.
    """
    limits, of_tenant = spec.limits, tenant_of(farm.served, tenant)
    quotas, lane = of_tenant.quotas, of_tenant.quotas.queued or 0
    known = farm.served.tenants
    if not lane and len(known) > (DEFAULT_TENANT in known):
        lane = farm.settings.tenant_queue_limit
    return Bounds(
        model=limits.queue_limit + (limits.max_concurrency or 0) if limits.queue_limit else 0,
        tenant=quotas.in_flight or 0,
        lane=lane,
        tokens_per_minute=quotas.tokens_per_minute or 0,
        weight=of_tenant.weight,
    )
