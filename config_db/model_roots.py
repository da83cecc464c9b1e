"""Where local models may lie, as far as a process that writes the config DB knows: only workers refuse them."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from config_db.spec import ModelSpec


def outside(spec: ModelSpec, roots: Sequence[str]) -> list[str]:
    """A warning for each local source of a model under none of the roots; none if no root is known.

    Names alone are compared, since the directories are the workers': links that these follow are not seen.
    """
    if not roots:
        return []
    return [
        f"{field}: {path} lies under none of the allowed model directories ({', '.join(roots)}), "
        "so workers that allow the same ones refuse it"
        for field, path in _paths(spec)
        if not any(PurePosixPath(path).is_relative_to(root) for root in roots)
    ]


def _paths(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """The local sources of a model and of its adapters, with their fields."""
    if spec.source.path is not None:
        yield "source.path", spec.source.path
    for name, source in spec.adapters.items():
        if source.path is not None:
            yield f"adapters.{name}.path", source.path
