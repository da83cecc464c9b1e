"""The door: before anything else is done for a request, who calls, and may they?"""

from collections.abc import Callable, Iterable, Mapping
from ipaddress import ip_address
from typing import Final, TypeAlias

from flask import Flask, current_app, request

from common.errors import SetupError, UnauthenticatedError
from common.settings import WebSettings
from config_db.access import KeySpec, Scope
from webapp.auth.oidc import OidcTokens
from webapp.auth.principals import ANYBODY, Principal, principal, remember
from webapp.auth.tokens import ApiKeys, StaticTokens, read_tokens

Authenticate: TypeAlias = Callable[[str], Principal | None]

OPEN: Final = frozenset(("health", "oip_health", "docs", "pages"))
"""Blueprints that anybody may ask: probes hold no key, and the document tells no more than the source does."""
CONFIG: Final = frozenset(("configs", "config_epochs", "config_bundles"))
POOLS: Final = "pools"
_DOOR: Final = "farmhand.door"
READS: Final = frozenset(("GET", "HEAD", "OPTIONS"))
READING_POSTS: Final = frozenset(("config_bundles.resolve",))
CLOSED_READS: Final = frozenset(("config_epochs.export", "config_epochs.history", "config_epochs.diff"))
"""Of the config DB, what tells more than callers need to use the models."""


def authenticator(settings: WebSettings, known_keys: Callable[[], Mapping[str, KeySpec]]) -> Authenticate | None:
    """Who checks tokens, as the settings say; None if the farm asks for none. ``known_keys``: of the config DB, by id.

    Raises:
        SetupError: what the mode needs is not set.
    """
    match settings.auth:
        case "none":
            return None
        case "keys":
            return ApiKeys(known_keys)
        case "static":
            tokens = read_tokens(settings.auth_tokens.get_secret_value(), settings.auth_tokens_file)
            admin = read_tokens(settings.auth_admin_tokens.get_secret_value(), settings.auth_admin_tokens_file)
            if not tokens and not admin:
                raise SetupError("FARMHAND_AUTH is static and there is no token: set FARMHAND_AUTH_TOKENS")
            return StaticTokens(tokens, admin)
        case "oidc":
            if not settings.oidc_issuer or not settings.oidc_audience:
                raise SetupError("FARMHAND_AUTH is oidc: set FARMHAND_OIDC_ISSUER and FARMHAND_OIDC_AUDIENCE")
            return OidcTokens(
                issuer=settings.oidc_issuer,
                audience=settings.oidc_audience,
                tenant_claim=settings.oidc_tenant_claim,
                jwks_url=settings.oidc_jwks_url,
            )


def install(app: Flask, authenticate: Authenticate | None) -> None:
    """Ask every request of the application for its token, and hold it to its scopes."""

    @app.before_request
    def check() -> None:
        if authenticate is None:
            remember(ANYBODY)
            return
        if request.blueprint in OPEN:
            return
        remember(_caller(authenticate))
        principal().require(scope_of(request.blueprint, request.endpoint, request.method))

    app.extensions[_DOOR] = check


def check_again() -> None:
    """Ask the current request for its token once more, as an answer that goes on for long may outlive a key.

    Raises:
        UnauthenticatedError, ForbiddenError: as at first.
        AuthUnavailableError: the issuer of tokens does not answer.
    """
    current_app.extensions[_DOOR]()


def scope_of(blueprint: str | None, endpoint: str | None, method: str) -> Scope:
    """What a route takes."""
    if blueprint == POOLS:
        return "infer" if method in READS else "pools"
    if blueprint not in CONFIG:
        return "infer"
    reads = (method in READS and endpoint not in CLOSED_READS) or endpoint in READING_POSTS
    return "infer" if reads else "config"


def check_settings(settings: WebSettings, hosts: Iterable[str]) -> None:
    """Refuse to start where nobody could be let in, or, unless the operator insists, where anybody would be.

    Raises:
        SetupError: what the mode needs is not set, or it asks for no key and some host is not this machine's own.
    """
    authenticator(settings, dict)
    if settings.auth != "none" or settings.auth_open:
        return
    foreign = [host for host in hosts if not _is_loopback(host)]
    if foreign:
        raise SetupError(
            f"the API would listen on {foreign[0]} and ask nobody for a key: set FARMHAND_AUTH, or FARMHAND_AUTH_OPEN "
            "if something in front of it does"
        )


def _caller(authenticate: Authenticate) -> Principal:
    header = request.headers.get("Authorization", "").strip()
    scheme, _, rest = header.partition(" ")
    token = rest.strip() if scheme.lower() == "bearer" else header
    if not token:
        raise UnauthenticatedError("this farm asks for a key: send it as `Authorization: Bearer <key>`")
    found = authenticate(token)
    if found is None:
        raise UnauthenticatedError("the key is not valid here: it is unknown, expired or revoked")
    return found


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
