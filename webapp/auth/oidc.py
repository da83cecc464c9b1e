"""Bearer tokens of an OpenID Connect issuer: signed by its keys, for this audience, not expired."""

from collections.abc import Mapping
from time import monotonic
from typing import Any, Final, get_args

import httpx
import jwt
import msgspec

from common.errors import AuthUnavailableError
from common.logs import get_logger
from config_db.access import DEFAULT_TENANT, Scope
from config_db.spec import Name
from webapp.auth.principals import Principal

log = get_logger("webapp")

ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
"""Asymmetric ones only: a key that verifies cannot sign, and ``none`` is no algorithm."""
LEEWAY_S: Final = 30.0
FETCH_TIMEOUT_S: Final = 3.0
KEYS_FRESH_S: Final = 300.0
AGAIN_AFTER_S: Final = 10.0
"""An unknown key makes us ask the issuer anew, at most so often: anybody can name a key that there is not."""
_KNOWN_SCOPES: Final = frozenset(get_args(Scope))


class OidcTokens:
    """Checks tokens against the keys of one issuer, which are fetched when needed and kept for some minutes.

    Args:
        issuer: what ``iss`` must be; its configuration stands under ``/.well-known/openid-configuration``.
        audience: what ``aud`` must hold.
        tenant_claim: the claim that names the tenant; empty: every caller is of the default tenant.
        jwks_url: where the keys are; empty: as the issuer's configuration says.
    """

    def __init__(self, *, issuer: str, audience: str, tenant_claim: str, jwks_url: str) -> None:
        self._issuer = issuer
        self._audience = audience
        self._tenant_claim = tenant_claim
        self._jwks_url = jwks_url
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")

    def __call__(self, token: str) -> Principal | None:
        """Who presents this token; None if it is not valid here.

        Raises:
            AuthUnavailableError: the issuer's keys cannot be had.
        """
        try:
            key = self._key(str(jwt.get_unverified_header(token).get("kid", "")))
            if key is None:
                return None
            claims: dict[str, Any] = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm_name] if key.algorithm_name in ALGORITHMS else [],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.InvalidTokenError as error:
            log.info("token_refused", reason=type(error).__name__)
            return None
        return self._principal(claims)

    def _principal(self, claims: Mapping[str, Any]) -> Principal | None:
        tenant: Any = claims.get(self._tenant_claim) if self._tenant_claim else DEFAULT_TENANT
        try:
            tenant = msgspec.convert(tenant, Name)
        except msgspec.ValidationError:
            log.info("token_refused", reason="it names no tenant")
            return None
        said = claims.get("scope", claims.get("scp", ()))
        words = said.split() if isinstance(said, str) else said if isinstance(said, list) else ()
        scopes: frozenset[Any] = _KNOWN_SCOPES.intersection(word for word in words if isinstance(word, str))
        return Principal(f"oidc {str(claims['sub'])[:100]}", tenant, scopes or frozenset(("infer",)))

    def _key(self, name: str) -> jwt.PyJWK | None:
        """The issuer's key of this name, asking anew if it is unknown or what is known is old."""
        age_s = monotonic() - self._fetched_at
        if age_s > KEYS_FRESH_S or (name not in self._keys and age_s > AGAIN_AFTER_S):
            self._fetch()
        return self._keys.get(name)

    def _fetch(self) -> None:
        """Ask the issuer for its keys; those known serve on while it does not answer."""
        self._fetched_at = monotonic()  # also of a failure: the next request does not wait for it, too
        try:
            with httpx.Client(timeout=FETCH_TIMEOUT_S, follow_redirects=False) as client:
                if not self._jwks_url:
                    place = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
                    self._jwks_url = str(client.get(place).raise_for_status().json()["jwks_uri"])
                found = client.get(self._jwks_url).raise_for_status().json()
            keys = jwt.PyJWKSet.from_dict(found).keys
        except (httpx.HTTPError, ValueError, KeyError, TypeError, jwt.PyJWTError) as error:
            log.warning("issuer_unreadable", issuer=self._issuer, error=str(error))
            if not self._keys:
                raise AuthUnavailableError("the issuer of tokens does not answer; try again soon") from error
            return
        self._keys = {str(key.key_id): key for key in keys if key.key_id is not None}
