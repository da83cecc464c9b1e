"""Fixtures of more than one file of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import LivePool, starting_pools


@pytest.fixture
def start_pool(tmp_path: Path) -> Iterator[Callable[..., LivePool]]:
    """Starts pools of hosts, configured by the arguments where the defaults of ``tests.hosts`` are not wanted."""
    with starting_pools(tmp_path) as start:
        yield start
