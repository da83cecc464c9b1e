"""Which devices and cores there are for hosts, found without torch, which the worker does not import."""

import importlib.metadata
import os
from pathlib import Path


def name_devices(device: str, gpus: int) -> tuple[str, ...]:
    """Torch's names of the devices that ``FARMHAND_DEVICE`` asks for, where ``gpus`` are visible."""
    if device == "auto":
        return _all_gpus(gpus) if gpus and has_torch_for_gpus() else ("cpu",)
    return _all_gpus(max(1, gpus)) if device == "cuda" else (device,)


def share_devices(devices: tuple[str, ...], number: int, workers: int) -> tuple[tuple[str, ...], int]:
    """The devices of one of the workers of this machine, and how many workers share each of those.

    Several GPUs are dealt out; where there are fewer of them than workers, as on CPU, workers share them.
    """
    place = number - 1
    if workers <= len(devices):
        return devices[place::workers], 1
    mine = devices[place % len(devices)]
    return (mine,), len(range(place % len(devices), workers, len(devices)))


def visible_gpus(visible: str | None) -> int:
    """GPUs that NVIDIA's driver shows in ``/dev`` (not on WSL) and ``CUDA_VISIBLE_DEVICES``, given here, leaves."""
    present = len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def has_torch_for_gpus() -> bool:
    """Whether the installed torch is a build for GPUs, as its version says (``2.13.0+cpu`` is not)."""
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def usable_cores() -> int:
    """Cores this process may use: its affinity, and its container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2 here, or no quota ("max")
        return cores


def _all_gpus(count: int) -> tuple[str, ...]:
    return tuple(f"cuda:{index}" for index in range(count))
