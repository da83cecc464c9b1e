"""What must be there before hosts are started; each refusal is one line."""

import os
import re
import subprocess
import sys
from typing import Final

from common.errors import SetupError
from workers.hosts.config import HostConfig
from workers.hosts.devices import has_torch_for_gpus

ASK_LIMIT_S: Final = 300.0
"""So long torch may take to say what it sees, its import from a cold disk included."""
_GPU: Final = re.compile(r"cuda:(0|[1-9][0-9]*)")


def check_devices(config: HostConfig) -> None:
    """Refuse devices that are not there: a host for them would die at birth, again and again.

    torch, which knows for certain, is asked only where the driver does not show the device: its import takes seconds.

    Raises:
        SetupError: a device has no name of torch's, or is not there.
    """
    if config.devices == ("cpu",):
        return
    last = config.devices[-1]
    number = _GPU.fullmatch(last)
    if number is None:
        raise SetupError(f"FARMHAND_DEVICE is {last!r}: it must be auto, cpu, cuda or cuda:N, as cuda:0")
    if not has_torch_for_gpus():
        raise SetupError(f"FARMHAND_DEVICE asks for {last}, but no torch for GPUs is installed: set it to auto or cpu")
    if int(number[1]) < config.gpus:
        return
    seen = count_gpus(config)
    if int(number[1]) >= seen:
        raise SetupError(
            f"FARMHAND_DEVICE asks for {last}, but the number of GPUs that torch sees here is {seen}: set it to "
            "auto, or see whether the driver and CUDA_VISIBLE_DEVICES show the device"
        )


def count_gpus(config: HostConfig) -> int:
    """GPUs that torch sees, asked in a process of its own.

    Raises:
        SetupError: torch cannot say; with the last line that it said instead.
    """
    command = [sys.executable, "-m", "workers.host.devices", str(os.getpid())]
    try:
        asked = subprocess.run(  # noqa: S603 - our own interpreter and module
            command, env=config.environment(), capture_output=True, text=True, timeout=ASK_LIMIT_S, check=True
        )
        return int(asked.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise SetupError(
            f"FARMHAND_DEVICE asks for a GPU, but torch does not say which there are: {said[-1]}"
        ) from error
