"""Which models are let through to a queue."""

import pytest

from common.errors import ModelUnsupportedError
from config_db.spec import ModelSpec, Source
from webapp.admission import check_supported


def spec(family: str, unsupported: str | None = None) -> ModelSpec:
    return ModelSpec(id="org/m", family=family, source=Source(path="/m"), unsupported=unsupported)


def test_a_family_of_the_operators_own_comes_before_what_this_release_lacks() -> None:
    with pytest.raises(ModelUnsupportedError, match="not in this release yet"):
        check_supported(spec("gliner"), ())
    check_supported(spec("gliner"), {"gliner": "my.code:Gliner"})
    check_supported(spec("dense"), ())
    check_supported(spec("mine"), ())  # whoever wrote it down knows it; the worker has the last word


@pytest.mark.parametrize("families", [(), {"dense": "my.code:Dense"}])
def test_a_model_that_says_it_cannot_be_served_is_believed(families: dict[str, str]) -> None:
    with pytest.raises(ModelUnsupportedError, match="needs code"):
        check_supported(spec("dense", "needs code of its own"), families)
