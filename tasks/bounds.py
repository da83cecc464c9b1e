"""What admission holds one request to, besides the length of its queue: the limits of its model and of its tenant.

Only says them: ``publish.lua`` counts and refuses, ``refusals`` puts that into words.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The most there may be; 0: no bound.

    ``model``: open requests of the model, ``tenant``: of the tenant, ``lane``: of the tenant in this lane; open means
    waiting or running. ``tokens_per_minute`` is the tenant's. ``weight`` is its share of a busy farm against others'.
    """

    model: int = 0
    tenant: int = 0
    lane: int = 0
    tokens_per_minute: int = 0
    weight: float = 1.0

    def text(self, tokens: int) -> str:
        """As ``publish.lua`` reads them for a request of so many tokens."""
        if not (self.model or self.tenant or self.lane or self.tokens_per_minute):
            return ""
        return f"{self.model} {self.tenant} {self.lane} {self.tokens_per_minute} {tokens}"


UNBOUNDED: Final = Bounds()
