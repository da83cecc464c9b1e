"""What a worker refuses to start on: a Redis that says it is old, and one that does not give back what it was given."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis
import structlog

from common.errors import SetupError
from workers.checks import check_redis, self_test

GOOD = {"redis_version": "7.4.1", "maxmemory_policy": "noeviction", "aof_enabled": 1}


class SaysOfItself:
    """A Redis of which only its INFO is asked."""

    def __init__(self, **info: Any) -> None:
        self._info = GOOD | info

    def info(self) -> dict[str, Any]:
        return self._info


def check(**info: Any) -> None:
    check_redis(SaysOfItself(**info))  # type: ignore[arg-type]  # all of a client that is used


@pytest.mark.parametrize("version", ["6.2.0", "6.10.1", "7.0", "10.0.0"])
def test_a_redis_that_is_new_enough_is_taken_without_a_word(version: str) -> None:
    with structlog.testing.capture_logs() as lines:
        check(redis_version=version)
    assert lines == []


@pytest.mark.parametrize("version", ["6.1.9", "6.0", "5.0.14", "2.8"])
def test_an_older_redis_is_refused(version: str) -> None:
    with pytest.raises(SetupError, match=rf"Redis {version} is too old: the farm needs 6\.2 or newer"):
        check(redis_version=version)


def test_a_redis_that_evicts_is_refused() -> None:
    with pytest.raises(SetupError, match=r"maxmemory-policy allkeys-lru.*noeviction"):
        check(maxmemory_policy="allkeys-lru")


def test_a_redis_that_forgets_at_a_restart_is_warned_of() -> None:
    with structlog.testing.capture_logs() as lines:
        check(aof_enabled=0)
    assert [(line["event"], line["log_level"]) for line in lines] == [("redis_without_appendonly", "warning")]


class Twisting(redis.Redis):
    """A real Redis between which and the worker something changes the answers to one command."""

    twisted: tuple[str, Any] = ("", None)

    def execute_command(self, *words: Any, **options: Any) -> Any:
        answer = super().execute_command(*words, **options)
        command, instead = self.twisted
        if words[0] != command:
            return answer
        if isinstance(instead, Exception):
            raise instead
        return instead


@pytest.fixture
def twisting(redis_url: str) -> Iterator[Twisting]:
    with Twisting.from_url(redis_url) as client:
        yield client


def test_a_redis_that_gives_back_what_it_was_given_passes_and_keeps_nothing(twisting: Twisting) -> None:
    self_test(twisting)
    assert twisting.keys("*self-test*") == []


@pytest.mark.parametrize(
    ("command", "instead", "says"),
    [
        ("LRANGE", [b"another"], "did not come back as it was sent"),
        ("LRANGE", [], "did not come back as it was sent"),
        ("HLEN", 0, "did not come back as it was sent"),
        ("EVAL", [], "did not come back as it was sent"),
        ("EVAL", redis.ResponseError("unknown command 'eval'"), "self-test through Redis failed: unknown command"),
    ],
)
def test_a_redis_that_does_not_is_refused_and_keeps_nothing(
    twisting: Twisting, command: str, instead: Any, says: str
) -> None:
    twisting.twisted = (command, instead)
    with pytest.raises(SetupError, match=says):
        self_test(twisting)
    assert twisting.keys("*self-test*") == []
