"""The caller of the current request: whose it is, and what it may do."""

from dataclasses import dataclass
from typing import Any, Final, cast, get_args

from flask import g

from common.errors import ForbiddenError
from config_db.access import DEFAULT_TENANT, Scope
from config_db.spec import LatencyClass

ALL_SCOPES: Final[frozenset[Scope]] = frozenset(get_args(Scope))


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is. ``name`` goes into the history of the config DB; it holds no secret."""

    name: str
    tenant: str = DEFAULT_TENANT
    scopes: frozenset[Scope] = ALL_SCOPES
    latency_class: LatencyClass = "interactive"

    def may(self, scope: Scope) -> bool:
        """Whether it has this scope; ``admin`` has all."""
        return scope in self.scopes or "admin" in self.scopes

    def require(self, scope: Scope) -> None:
        """ForbiddenError unless it has this scope."""
        if not self.may(scope):
            has = ", ".join(sorted(self.scopes)) or "none"
            raise ForbiddenError(f"this takes the scope {scope!r}; the key has {has}", details={"scope": scope})


ANYBODY: Final = Principal("anonymous")
"""Every caller of a farm that asks for no token."""


def principal() -> Principal:
    """The caller of the current request."""
    return cast("Principal", g.principal)


def remember(found: Principal) -> None:
    """Say who calls, for the rest of the current request."""
    context: Any = g
    context.principal = found
