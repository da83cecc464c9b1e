"""What the hosts of a worker are started with: how many on which devices, their memory, families and threads."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from common.errors import SetupError
from common.settings import WorkerSettings
from workers.host.families.registry import BUILT_IN
from workers.host.frames import HostSetup
from workers.hosts.devices import name_devices, share_devices, usable_cores, visible_gpus
from workers.weights.setup import WeightsSetup, weights_setup

CPU_PASS_TOKENS: Final = 2048
GPU_PASS_TOKENS: Final = 16384
KEPT_SHAPES: Final = "32"


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How many hosts there are, where they run and what they may use.

    ``devices`` are torch's names; hosts are dealt out to them in turn, and ``sharing`` workers use them. ``gpus`` is
    how many the driver shows without torch being asked. ``device_memory`` is for all hosts of a device together; None:
    ``device_fraction`` of what is measured. ``preimport`` names modules imported before the first fork.
    ``growth_bytes``: a host that has grown by more is replaced.
    """

    hosts: int = 1
    devices: tuple[str, ...] = ("cpu",)
    sharing: int = 1
    gpus: int = 0
    device_memory: int | None = None
    device_fraction: float = 0.85
    model_dirs: tuple[str, ...] = ()
    extra_families: Mapping[str, str] = field(default_factory=dict)
    preimport: tuple[str, ...] = ()
    weights: WeightsSetup = field(default_factory=WeightsSetup)
    batch_max_tokens: int = CPU_PASS_TOKENS
    torch_threads: int = 1
    log_level: str = "INFO"
    copies_dir: str | None = None
    copies_bytes: int = 0
    host_memory_bytes: int = 0
    growth_bytes: int = 0

    def setup(self) -> HostSetup:
        """What the zygote is told."""
        return HostSetup(
            preimport=self.preimport,
            extra_families=dict(self.extra_families),
            weights=msgspec.structs.replace(self.weights, model_dirs=self.model_dirs),
            pass_tokens=self.batch_max_tokens,
            torch_threads=self.torch_threads,
            budget_bytes=self.device_memory or 0,
            device_fraction=self.device_fraction,
            hosts_per_device=-(-self.hosts // len(self.devices)) * self.sharing,
            log_level=self.log_level,
            copies_dir=self.copies_dir,
            copies_bytes=self.copies_bytes,
            host_memory_bytes=self.host_memory_bytes,
            growth_bytes=self.growth_bytes,
        )

    def environment(self) -> dict[str, str]:
        """The zygote's: ours, the modules we see, and what BLAS, OpenMP and tokenizers read when they load.

        On CPU torch and oneDNN keep a computation for each shape they have met, 1024 of them unless told otherwise, and
        every padding-free pass has a shape of its own: two hosts grew by 465 MiB in a minute of overload, with 32 by 5.
        """
        threads = str(self.torch_threads)
        return {
            "LRU_CACHE_CAPACITY": KEPT_SHAPES,
            "ONEDNN_PRIMITIVE_CACHE_CAPACITY": KEPT_SHAPES,
            **os.environ,  # noqa: TID251 - handed on, not read
            "PYTHONPATH": os.pathsep.join(path for path in ("", *sys.path) if path),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }


def host_config(settings: WorkerSettings) -> HostConfig:
    """The hosts that the settings ask for: one per GPU or, without one, per usable core, unless a number is set.

    Workers of one machine share its devices and cores.

    Raises:
        SetupError: this worker's number is none of them.
    """
    if settings.worker_number > settings.workers_here:
        raise SetupError(
            f"FARMHAND_WORKER_NUMBER is {settings.worker_number}, but FARMHAND_WORKERS_HERE says that there are "
            f"{settings.workers_here}"
        )
    gpus = visible_gpus(settings.cuda_visible_devices)
    devices, sharing = share_devices(name_devices(settings.device, gpus), settings.worker_number, settings.workers_here)
    on_cpu = devices == ("cpu",)
    places = {**BUILT_IN, **settings.family_places}
    preload = [name.strip() for name in settings.preload_families.split(",") if name.strip()]
    return HostConfig(
        hosts=settings.hosts or (max(1, usable_cores() // sharing) if on_cpu else len(devices)),
        devices=devices,
        sharing=sharing,
        gpus=gpus,
        device_memory=int(settings.device_memory) if settings.device_memory is not None else None,
        device_fraction=settings.device_fraction,
        model_dirs=settings.model_roots,
        extra_families=settings.family_places,
        preimport=tuple(places[name].partition(":")[0] for name in preload if name in places)
        + (("workers.weights.bucket",) if settings.bucket or settings.bucket_sources else ()),
        weights=weights_setup(settings),
        batch_max_tokens=settings.batch_max_tokens or (CPU_PASS_TOKENS if on_cpu else GPU_PASS_TOKENS),
        torch_threads=settings.torch_threads,
        log_level=settings.log_level,
        copies_dir=str(settings.state_dir.resolve() / "copies"),
        copies_bytes=int(settings.copies_limit),
        host_memory_bytes=int(settings.host_memory or 0),
        growth_bytes=int(settings.host_growth),
    )
