"""The device of one host: what torch calls it, how much of it models may hold, and which errors speak of it.

torch is asked only if it has been imported or the device is a GPU: a host of families without torch never imports it.
``python -m workers.host.devices <worker's pid>`` prints the number of GPUs, for a worker that must know at its start.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from workers.host.copies import Copies
from workers.host.families.protocol import Device
from workers.host.frames import HostSetup
from workers.host.host_memory import HostMemory
from workers.host.orphans import die_with_parent

_CGROUP: Final = Path("/sys/fs/cgroup")
_MEMINFO: Final = Path("/proc/meminfo")
_STATUS: Final = Path("/proc/self/status")
_libc: Final = ctypes.CDLL(None)
HOST_FRACTION: Final = 0.25
"""Of the memory that is available at its start, a host of a GPU keeps weights page-locked in this share."""


def open_device(name: str, setup: HostSetup) -> Device:
    """The device by torch's name of it; on a GPU its context is made, which fails here if it cannot be used."""
    copies = Copies(Path(setup.copies_dir), setup.copies_bytes) if setup.copies_dir and setup.copies_bytes else None
    if name == "cpu":
        return Device(pass_tokens=setup.pass_tokens, copies=copies)
    import torch

    index = int(name.rpartition(":")[2])
    torch.cuda.set_device(index)
    torch.zeros(1, device=name)
    memory = HostMemory(setup.host_memory_bytes or int(HOST_FRACTION * _available_bytes() / setup.hosts_per_device))
    return Device(kind="cuda", index=index, name=name, pass_tokens=setup.pass_tokens, copies=copies, host_memory=memory)


def count_gpus() -> int:
    """GPUs that torch can use; no context is made on any of them."""
    import torch

    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def set_threads(count: int) -> None:
    """How many threads one forward pass on CPU may use; a torch imported later reads the environment instead."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(count)


def measure_budget(device: Device, setup: HostSetup) -> int:
    """Bytes that models of one host may hold: as set, or a fraction of what is there; hosts of one device share it."""
    if setup.budget_bytes:
        return setup.budget_bytes // setup.hosts_per_device
    return int(_room(device) * setup.device_fraction) // setup.hosts_per_device


def held_bytes(device: Device) -> int:
    """What this process holds of the device's memory; on CPU its own pages, without those it has mapped from files."""
    if device.kind == "cuda":
        import torch

        return int(torch.cuda.memory_reserved(device.index))
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "RssAnon:")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or the machine, had no memory left for this."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator on CPU


def is_device_lost(error: BaseException) -> bool:
    """Whether the device is of no use to this process any more: no request's fault, and only a new host helps."""
    if is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def clear_caches() -> None:
    """Give what nobody uses back to the device."""
    gc.collect()
    trim()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def trim() -> None:
    """Give memory that was freed back to the system: glibc keeps it, in pieces, after a load has converted weights."""
    trim_heap = getattr(_libc, "malloc_trim", None)  # glibc's own; other C libraries give memory back by themselves
    if trim_heap is not None:
        trim_heap(0)


def _room(device: Device) -> int:
    if device.kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device.index)[1])
    return min(_available_bytes(), *_cgroup_room())


def _available_bytes() -> int:
    lines = (line.split() for line in _MEMINFO.read_text().splitlines())
    return next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")


def _cgroup_room() -> Iterator[int]:
    """What the container's memory limits leave, where there are any (cgroup v2, then v1)."""
    pairs = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    yield sys.maxsize
    for limit, usage in pairs:
        with suppress(OSError, ValueError):  # no such file, or "max"
            yield max(0, int((_CGROUP / limit).read_text()) - int((_CGROUP / usage).read_text()))


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.stdout.write(f"{count_gpus()}\n")
