"""What differs between two contents, field by field."""

from typing import Any

import pytest
from msgspec import UNSET

from config_db.diff import Difference, differences, is_same


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"max_length": 256}, {"max_length": 512}, [Difference("max_length", 256, 512)]),
        ({}, {"pooling": "cls"}, [Difference("pooling", UNSET, "cls")]),
        ({"pooling": "cls"}, {}, [Difference("pooling", "cls", UNSET)]),
        ({"limits": {"max_items": 1}}, {}, [Difference("limits.max_items", 1, UNSET)]),
        ({}, {"limits": {"max_items": 1}}, [Difference("limits.max_items", UNSET, 1)]),
        ({"options": {}}, {}, [Difference("options", {}, UNSET)]),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, [Difference("a.b.d", 2, 3)]),
        ({"aliases": ["a"]}, {"aliases": ["a", "b"]}, [Difference("aliases", ["a"], ["a", "b"])]),
        ({"options": {"a.b c": 1}}, {"options": {}}, [Difference("options['a.b c']", 1, UNSET)]),
        ({"options": {"x": 1}}, {"options": {"x": True}}, [Difference("options.x", 1, True)]),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, [Difference("a", 1, 2), Difference("b", 1, 2)]),
        ({"a": {"b": [1, {"c": 1.0}]}}, {"a": {"b": [1, {"c": 1}]}}, []),
    ],
)
def test_each_field_that_differs_is_named(old: dict[str, Any], new: dict[str, Any], found: list[Difference]) -> None:
    assert differences(old, new) == found


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1.0, True),
        (10**23, 1e23, True),
        (1e23, 10**23, True),
        (10**400, 1.0, False),
        (1, True, False),
        (0, False, False),
        (None, {}, False),
        (None, None, True),
        ([1, [2]], (1, [2]), True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1, "b": None}, False),
        ("1", 1, False),
    ],
)
def test_what_postgres_gives_back_is_the_same_and_nothing_else(one: Any, other: Any, same: bool) -> None:
    assert is_same(one, other) is same
