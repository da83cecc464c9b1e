"""Which requests may share a forward pass, told without Redis."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tasks.batching import FORWARD_FREE, batch_key
from tasks.names import Operation

SPEC = "0123456789abcdef"
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def key(options: dict[str, Any], *, operation: Operation = Operation.ENCODE, adapter: str | None = None) -> str:
    return batch_key("org/m", SPEC, operation, adapter, options)


def test_a_request_without_options_has_the_plain_key() -> None:
    assert key({}) == "org/m@0123456789abcdef|encode||"


def test_what_changes_no_forward_pass_does_not_part_requests() -> None:
    assert key(dict.fromkeys(FORWARD_FREE, True)) == key({})


def test_what_does_change_it_parts_them() -> None:
    keys = {
        key({}),
        key({"pooling": "cls"}),
        key({"pooling": "mean"}),
        key({}, adapter="a"),
        key({}, operation=Operation.SCORE),
    }
    assert len(keys) == 5


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=4))
def test_a_caller_s_words_enter_the_key_as_a_digest_only(options: dict[str, Any]) -> None:
    prefix, _, digest = key(options).rpartition("|")
    assert prefix == "org/m@0123456789abcdef|encode|"
    assert digest == "" or (len(digest) == 16 and set(digest) <= set("0123456789abcdef"))
    assert key(dict(reversed(options.items()))) == key(options)
