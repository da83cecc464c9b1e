"""How many tokens one forward pass of an encoder holds."""

from typing import Final

from config_db.spec import ModelSpec
from workers.host.families.protocol import Device

CPU_PASS_TOKENS: Final = 1024
"""A larger pass leaves the cache of a core: at 2048 tokens all-MiniLM-L6-v2 gave 5 to 10 % less."""


def pass_budget(spec: ModelSpec, device: Device) -> int:
    """Tokens of one pass, within the spec's own limit."""
    most = min(device.pass_tokens, CPU_PASS_TOKENS) if device.kind == "cpu" else device.pass_tokens
    return min(spec.limits.max_batch_tokens or most, most)
