"""``/v1/pools``: workers set aside for a client, as long as it renews their lease."""

from typing import Final

from flask import Blueprint, Response
from flask.typing import ResponseReturnValue
from msgspec import to_builtins

from common.errors import (
    ConfigUnavailableError,
    ContentConflictError,
    FarmError,
    NotFoundError,
    QueueUnavailableError,
    RequestError,
)
from config_db.access import PoolSpec
from tasks.codec import dump_json
from webapp import pools, problems
from webapp.farm import farm
from webapp.openapi.declared import Answered, Body, answers_errors_as, declared
from webapp.wire import answers, bodies
from webapp.wire import pools as wire
from webapp.wire.pools import PoolAnswer, PoolBody, PoolDeleted, PoolList, PoolProblem

bp = Blueprint("pools", __name__)

_EXAMPLE: Final = "eval"
_POOL: Final = Answered(PoolAnswer, "The pool, and who serves it now.")
_BODY: Final = Body(PoolBody, {"name": _EXAMPLE, "gpus": {"cpu": 1}})
_READ_ERRORS: Final = (RequestError, NotFoundError, QueueUnavailableError)
_WRITE_ERRORS: Final = (*_READ_ERRORS, ConfigUnavailableError)


@bp.errorhandler(FarmError)
@answers_errors_as(PoolProblem)
def problem(error: FarmError) -> Response:
    """As everywhere, and once more under ``detail``, where some clients of these routes look for it."""
    response = problems.problem(error)
    body = problems.error_body(error)
    response.set_data(dump_json({"error": body, "detail": body}))
    return response


@bp.post("/v1/pools")
@declared(
    _POOL,
    more={201: Answered(PoolAnswer, "The pool is new.")},
    body=_BODY,
    errors=(ContentConflictError, QueueUnavailableError, ConfigUnavailableError),
)
def create() -> ResponseReturnValue:
    """Make a pool, or make it what the body says; either way its lease runs from now."""
    here = farm()
    body = bodies.read(PoolBody, max_bytes=here.settings.max_body_bytes)
    wanted = wire.wanted_profiles(body, own_profile=here.settings.machine_profile)
    name = body.name.lower()
    spec, is_new = pools.hold(here, name, wanted, lease_s=body.ttl_seconds)
    return _answer(name, spec, status=201 if is_new else 200)


@bp.get("/v1/pools")
@declared(PoolList, errors=(QueueUnavailableError,))
def index() -> ResponseReturnValue:
    """The pools that the caller may use, by name."""
    here = farm()
    workers = here.client.workers()
    found = [
        wire.pool_answer(name, spec, pools.serving(workers, name, spec)) for name, spec in pools.visible(here).items()
    ]
    return answers.answer(to_builtins(PoolList(found)))


@bp.get("/v1/pools/<pool>")
@declared(_POOL, errors=_READ_ERRORS, path={"pool": _EXAMPLE})
def show(pool: str) -> ResponseReturnValue:
    """One pool, and who serves it now."""
    name = pools.check_name(pool, param="name")
    spec = pools.find_soon(farm(), name)
    if spec is None:
        raise NotFoundError(f"there is no pool {name!r}", param="name")
    return _answer(name, spec)


@bp.post("/v1/pools/<pool>/renew")
@declared(_POOL, errors=_WRITE_ERRORS, path={"pool": _EXAMPLE})
def renew(pool: str) -> ResponseReturnValue:
    """Let the lease run from now. The body is not looked at."""
    name = pools.check_name(pool, param="name")
    return _answer(name, pools.renew(farm(), name))


@bp.delete("/v1/pools/<pool>")
@declared(PoolDeleted, errors=_WRITE_ERRORS, path={"pool": _EXAMPLE})
def delete(pool: str) -> ResponseReturnValue:
    """Give the workers back."""
    name = pools.check_name(pool, param="name")
    pools.drop(farm(), name)
    return answers.answer(to_builtins(PoolDeleted(name)))


def _answer(name: str, spec: PoolSpec, *, status: int = 200) -> Response:
    found = wire.pool_answer(name, spec, pools.serving(farm().client.workers(), name, spec))
    return answers.answer(to_builtins(found), status=status)
