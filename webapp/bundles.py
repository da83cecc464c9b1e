"""The one bundle there is, ``default``: all families of this farm.

Public config tools know in bundles which worker runs what; here every worker has every family.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final

from config_db.convergence import Epoch, has_reached
from config_db.families import FAMILIES, why_unsupported
from config_db.spec import ModelSpec
from webapp.fleet import ProcessEpoch
from webapp.wire.config_answers import BundleStatus

BUNDLE: Final = "default"


def families(extra: Mapping[str, str]) -> list[str]:
    """The families that this farm runs, by name; ``extra`` are the operator's own."""
    return sorted(FAMILIES.keys() | extra.keys())


def families_hash(extra: Mapping[str, str]) -> str:
    """Tells farms with different families apart."""
    return hashlib.sha256("\n".join(families(extra)).encode()).hexdigest()


def bundles_of(spec: ModelSpec, extra: Mapping[str, str]) -> list[str]:
    """The bundles that run a model: the one, or none."""
    return [BUNDLE] if why_unsupported(spec, extra) is None else []


def bundle_status(spec: ModelSpec, processes: Sequence[ProcessEpoch], present: Epoch) -> BundleStatus:
    """Which of the workers that may run a model serve the present epoch."""
    machines = spec.placement.machine_profiles
    eligible = [
        process
        for process in processes
        if process.kind == "worker" and (not machines or process.machine_profile in machines)
    ]
    acked = [worker.name for worker in eligible if has_reached(worker.served, present.number, present)]
    pending = [worker.name for worker in eligible if worker.name not in acked]
    return {
        "bundle_id": BUNDLE,
        "expected_bundle_config_hash": spec.digest,
        "total_eligible_workers": len(eligible),
        "acked_workers": acked,
        "pending_workers": pending,
        "acked": bool(eligible) and not pending,
    }
