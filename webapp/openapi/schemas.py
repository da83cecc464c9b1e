"""The schemas of the types that views name, each made once, and what docstrings say as the document says it."""

from collections.abc import Iterable
from inspect import cleandoc
from typing import Any, Final

import msgspec

from config_db.json_schema import describe

_COMPONENT: Final = "#/components/schemas/{name}"


class Schemas:
    """The schemas of all types; those with a name stand among the components."""

    def __init__(self, kinds: Iterable[Any]) -> None:
        named = {repr(kind): kind for kind in kinds}
        made, components = msgspec.json.schema_components(named.values(), ref_template=_COMPONENT)
        self._made = dict(zip(named, made, strict=True))
        self.components = dict(sorted(components.items()))
        _say_that_words_are_texts([*made, *self.components.values()])
        describe(self.components)
        for part in self.components.values():
            part["description"] = in_markdown(part.get("description", ""))

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a type that was among ``kinds``."""
        return self._made[repr(kind)]


def _say_that_words_are_texts(part: Any) -> None:
    """Give lists of words their type, which readers of the document would else call any."""
    if isinstance(part, dict):
        words = part.get("enum")
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            part.setdefault("type", "string")
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _say_that_words_are_texts(inner)


def title(docstring: str | None) -> str:
    """A docstring's first line, without marks: readers show it as it stands."""
    return summary(docstring).replace("`", "")


def summary(docstring: str | None) -> str:
    """A docstring's first line."""
    return in_markdown(docstring).partition("\n")[0]


def details(docstring: str | None) -> str:
    """What follows the first line of a docstring."""
    return in_markdown(docstring).partition("\n")[2].strip()


def in_markdown(docstring: str | None) -> str:
    """A docstring as the document's readers show it."""
    return cleandoc(docstring or "").replace("``", "`")
