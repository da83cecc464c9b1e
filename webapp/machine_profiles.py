"""Which machine profiles there are: those that somebody serves, is configured for, or may come with."""

from common.errors import RequestError
from webapp.farm import Farm


def known_profiles(here: Farm) -> frozenset[str]:
    """Of the live workers, of this web process, of the models' placements and of the operator's pools.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """
    of_workers = {worker.machine_profile for worker in here.fleet.workers()}
    return here.served.machine_profiles() | of_workers | {here.settings.machine_profile}


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
