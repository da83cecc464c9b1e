"""Which models are let through to a queue."""

import pytest

from common.errors import ModelUnsupportedError
from config_db.spec import ModelSpec, Source
from webapp.admission import check_supported


def spec(family: str, unsupported: str | None = None) -> ModelSpec:
    return ModelSpec(id="org/m", family=family, source=Source(path="/m"), unsupported=unsupported)


@pytest.mark.parametrize("family", ["dense", "gliner", "mine"])
def test_a_family_may_be_the_operators_own(family: str) -> None:
    check_supported(spec(family))  # whoever wrote it down knows it; the worker has the last word


def test_a_model_that_says_it_cannot_be_served_is_believed() -> None:
    with pytest.raises(ModelUnsupportedError, match="needs code"):
        check_supported(spec("dense", "needs code of its own"))
