"""Tokens that the farm itself knows: a few from the environment, or the API keys of the config DB."""

import hmac
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final

from common.errors import SetupError
from config_db import keys
from config_db.access import KeySpec
from webapp.auth.principals import ALL_SCOPES, Principal

SHORTEST: Final = 16
"""A token that people think up is guessed; one of so many characters is at least not by accident."""


class StaticTokens:
    """Tokens set by the operator; all of the default tenant.

    Args:
        tokens: may do inference.
        admin_tokens: may do everything.
    """

    def __init__(self, tokens: Iterable[str], admin_tokens: Iterable[str]) -> None:
        self._known = [(_digest(token), Principal("token", scopes=frozenset(("infer", "jobs")))) for token in tokens]
        self._known += [(_digest(token), Principal("admin token", scopes=ALL_SCOPES)) for token in admin_tokens]

    def __call__(self, token: str) -> Principal | None:
        """Who presents this token; all are compared, so that the time tells nothing."""
        presented, found = _digest(token), None
        for known, owner in self._known:
            if hmac.compare_digest(presented, known):
                found = owner
        return found


class ApiKeys:
    """The keys of the config DB, as of this process's snapshot.

    Args:
        known: the keys now, by id.
    """

    def __init__(self, known: Callable[[], Mapping[str, KeySpec]]) -> None:
        self._known = known

    def __call__(self, token: str) -> Principal | None:
        """Who presents this key; None if it is none of ours, expired or revoked."""
        found = keys.match(self._known(), token, datetime.now(UTC))
        if found is None:
            return None
        key_id, spec = found
        return Principal(f"key {key_id}", spec.tenant, frozenset(spec.scopes), spec.latency_class)


def read_tokens(listed: str, file: Path | None) -> list[str]:
    """Tokens from a comma-separated setting and from the lines of a file.

    Raises:
        SetupError: the file cannot be read, or a token is too short.
    """
    found = [token.strip() for token in listed.split(",")]
    if file is not None:
        try:
            found += [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SetupError(f"the file of tokens {file} cannot be read: {error}") from error
    found = [token for token in found if token]
    if any(len(token) < SHORTEST for token in found):
        raise SetupError(f"a token of fewer than {SHORTEST} characters is no secret: make it longer")
    return found


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()
