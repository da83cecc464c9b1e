"""Which machine profiles there are: those that somebody serves, is configured for, or may come with."""

from common.errors import RequestError
from webapp.farm import Farm


def known_profiles(here: Farm) -> frozenset[str]:
    """Of the live workers, of this web process, of the models' placements and of the operator's pools.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """
    served = here.served
    return frozenset(
        {here.settings.machine_profile}
        | {worker.machine_profile for worker in here.fleet.workers()}
        | {profile for model in served.models.values() for profile in model.placement.machine_profiles}
        | {profile for pool in served.pools.values() if not pool.is_leased for profile in pool.machine_profiles}
    )


def check_profile(here: Farm, profile: str, *, param: str) -> None:
    """RequestError, with those that there are, for a machine profile that is nowhere."""
    known = sorted(known_profiles(here))
    if profile not in known:
        raise RequestError(
            f"no machine here has the profile {profile[:100]!r}; there {'are' if len(known) > 1 else 'is'} "
            f"{', '.join(known)}",
            param=param,
            details={"machine_profiles": known},
        )
