"""What the hosts of a worker are started with: how many on which devices, their memory, families and threads."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from common.settings import WorkerSettings
from workers.host.families.registry import BUILT_IN
from workers.host.frames import HostSetup
from workers.hosts.devices import name_devices, usable_cores, visible_gpus

CPU_PASS_TOKENS: Final = 2048
GPU_PASS_TOKENS: Final = 16384


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How many hosts there are, where they run and what they may use.

    ``devices`` are torch's names; hosts are dealt out to them in turn. ``gpus`` is how many the driver shows without
    torch being asked. ``device_memory`` is for all hosts of a device together; None: ``device_fraction`` of what is
    measured. ``preimport`` names modules imported before the first fork.
    """

    hosts: int = 1
    devices: tuple[str, ...] = ("cpu",)
    gpus: int = 0
    device_memory: int | None = None
    device_fraction: float = 0.85
    model_dirs: tuple[str, ...] = ()
    extra_families: Mapping[str, str] = field(default_factory=dict)
    preimport: tuple[str, ...] = ()
    hub_cache: str | None = None
    batch_max_tokens: int = CPU_PASS_TOKENS
    torch_threads: int = 1
    log_level: str = "INFO"

    def setup(self) -> HostSetup:
        """What the zygote is told."""
        return HostSetup(
            preimport=self.preimport,
            extra_families=dict(self.extra_families),
            model_dirs=self.model_dirs,
            hub_cache=self.hub_cache,
            pass_tokens=self.batch_max_tokens,
            torch_threads=self.torch_threads,
            budget_bytes=self.device_memory or 0,
            device_fraction=self.device_fraction,
            hosts_per_device=-(-self.hosts // len(self.devices)),
            log_level=self.log_level,
        )

    def environment(self) -> dict[str, str]:
        """The zygote's: ours, the modules we see, and what BLAS, OpenMP and tokenizers read when they load."""
        threads = str(self.torch_threads)
        return {
            **os.environ,  # noqa: TID251 - handed on, not read
            "PYTHONPATH": os.pathsep.join(path for path in ("", *sys.path) if path),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }


def host_config(settings: WorkerSettings) -> HostConfig:
    """The hosts that the settings ask for: one per GPU or, without one, per usable core, unless a number is set."""
    gpus = visible_gpus(settings.cuda_visible_devices)
    devices = name_devices(settings.device, gpus)
    on_cpu = devices == ("cpu",)
    places = {**BUILT_IN, **settings.family_places}
    preload = [name.strip() for name in settings.preload_families.split(",") if name.strip()]
    return HostConfig(
        hosts=settings.hosts or (usable_cores() if on_cpu else len(devices)),
        devices=devices,
        gpus=gpus,
        device_memory=int(settings.device_memory) if settings.device_memory is not None else None,
        device_fraction=settings.device_fraction,
        model_dirs=tuple(root for root in settings.model_dirs.split(":") if root),
        extra_families=settings.family_places,
        preimport=tuple(places[name].partition(":")[0] for name in preload if name in places),
        hub_cache=str(settings.hub_cache) if settings.hub_cache else None,
        batch_max_tokens=settings.batch_max_tokens or (CPU_PASS_TOKENS if on_cpu else GPU_PASS_TOKENS),
        torch_threads=settings.torch_threads,
        log_level=settings.log_level,
    )
