"""No worker is there: the answer on the SIE routes, of which two generations of clients expect different ones."""

import re
from typing import Final, Literal, TypedDict

from flask import Response, request

from common.errors import ProvisioningError
from webapp import problems
from webapp.bundles import BUNDLE
from webapp.wire import answers

_VERSION: Final = re.compile(r"(\d{1,6})\.(\d{1,6})")
_FIRST_TO_EXPECT_503: Final = (0, 10)


class Provisioning(TypedDict):
    """No worker is there yet; ask again after ``Retry-After``."""

    status: Literal["provisioning"]
    gpu: str
    bundle: str
    estimated_wait_s: float
    message: str


class Later(TypedDict, total=False):
    """A task that is queued or, where no worker is there for a caller who would wait, that one is on its way.

    It has the fields of one of the two: ``task_id`` and ``state``, or the others.
    """

    task_id: str
    state: Literal["queued"]
    status: Literal["provisioning"]
    gpu: str
    bundle: str
    estimated_wait_s: float
    message: str


def provisioning(error: ProvisioningError) -> Response:
    """503 to newer SDKs, which take a 202 for a damaged answer; 202 to older ones and to plain HTTP."""
    response = problems.problem(error)
    if _expects_503():
        return response
    body = Provisioning(
        status="provisioning",
        gpu=error.details["machine_profile"],
        bundle=BUNDLE,
        estimated_wait_s=error.details["estimated_wait_s"],
        message=error.message,
    )
    accepted = answers.answer(body, status=202)
    accepted.headers["Retry-After"] = response.headers["Retry-After"]
    return accepted


def _expects_503() -> bool:
    """Whether a newer SDK asks; a version that cannot be read is taken for one to come."""
    told = request.environ.get("HTTP_X_SIE_SDK_VERSION")
    if told is None:
        return False
    version = _VERSION.match(told)
    return version is None or (int(version[1]), int(version[2])) >= _FIRST_TO_EXPECT_503
