"""The parts of the command line that need no farm."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import farm, logs
from cli.backoff import Backoff
from cli.catalogue import demo_spec, specs_of_directories
from cli.data_dir import DataDir, check_port, why_not_free
from cli.demo import DEMO_MODEL
from cli.farm import FarmOptions, FarmPlan
from cli.main import app
from cli.screen import Screen
from cli.up import up
from common.errors import SetupError
from common.settings import WorkerSettings


def test_a_child_that_keeps_dying_waits_longer_up_to_half_a_minute() -> None:
    backoff = Backoff()
    assert [backoff.next_wait_s(lived_s=1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_half_a_minute_of_life_forgives_earlier_deaths() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.next_wait_s(lived_s=0)
    assert backoff.next_wait_s(lived_s=30) == 0.5


def test_a_taken_port_is_named_with_the_flag_that_changes_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match=rf"port {port} of 127\.0\.0\.1 is taken: choose another with --port"):
            check_port("127.0.0.1", port, flag="--port")
    assert why_not_free("127.0.0.1", port) is None


def test_a_host_that_is_not_this_machines_is_refused_in_one_line() -> None:
    with pytest.raises(SetupError, match="cannot be listened on"):
        check_port("192.0.2.1", 8080, flag="--port")
    with pytest.raises(SetupError, match="cannot be listened on"):
        check_port("no-such-host.invalid", 8080, flag="--port")


def test_a_data_directory_has_one_farm_and_says_which(tmp_path: Path) -> None:
    with DataDir(tmp_path) as first, DataDir(tmp_path) as second:
        first.take(url="http://127.0.0.1:1234")
        with pytest.raises(SetupError, match=rf"already runs .*pid {os.getpid()}, http://127\.0\.0\.1:1234"):
            second.take(url="http://127.0.0.1:9")
    with DataDir(tmp_path) as third:
        third.take(url="http://127.0.0.1:9")


def test_a_data_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with DataDir(tmp_path / "file" / "farm") as data, pytest.raises(SetupError, match="choose another with --data-dir"):
        data.take(url="")


@pytest.mark.parametrize(
    "left", ['{"x": 1.5}', '{"-1": 1.5}', '{"1e3": 1.5, "": 2.5}', '{"1": "x"}', '{"9%s": 1.5}' % ("9" * 30)]
)
def test_damaged_notes_of_former_children_are_survived(tmp_path: Path, left: str) -> None:
    with DataDir(tmp_path) as data:
        data.take(url="")
        (tmp_path / "children.json").write_text(left)
        data.await_orphans()


def test_a_server_keeps_its_port_while_that_is_free(tmp_path: Path) -> None:
    with DataDir(tmp_path) as data:
        data.take(url="")
        kept = data.port("redis")
        assert data.port("redis") == kept
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stranger.bind(("127.0.0.1", kept))
            stranger.listen()
            assert data.port("redis") != kept


def test_a_log_is_moved_aside_once_it_is_too_long(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with log.open("ab") as child:
        child.write(b"x" * (logs.LIMIT_BYTES + 1))
        child.flush()
        logs.keep_small(log)
        child.write(b"news\n")
    assert log.read_bytes() == b"news\n"
    assert (tmp_path / "worker.log.1").stat().st_size == logs.LIMIT_BYTES + 1


@pytest.mark.parametrize(
    ("written", "cause"),
    [
        ('{"event": "worker_refused", "reason": "Redis is too old"}\nworker: stopped\n', "Redis is too old"),
        ("LOG: hm\nFATAL:  files are odd\nDETAIL:  made by 16\nLOG: down\n", r"files are odd \(made by 16\)"),
        ("Traceback\nValueError: seven\n", r"ValueError: seven \(more in .*child\.log\)"),
        ("", "it said nothing"),
    ],
)
def test_the_cause_of_a_death_is_one_line_of_its_log(tmp_path: Path, written: str, cause: str) -> None:
    log = tmp_path / "child.log"
    log.write_text("an earlier life\n" + written)
    found = logs.cause(log, len("an earlier life\n"))
    assert "\n" not in found
    assert re.match(cause, found)


def test_two_directories_of_one_name_are_refused(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        folder = tmp_path / parent / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"hidden_size": 8}))
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SetupError, match="both be served as 'model'"):
        specs_of_directories([tmp_path / "a" / "model", tmp_path / "b" / "model"])


def plan(tmp_path: Path, options: FarmOptions, **settings: str) -> FarmPlan:
    with DataDir(tmp_path / "farm") as data:
        data.take(url="")
        return FarmPlan(options, data, WorkerSettings(**settings))


def test_servers_of_ones_own_are_used_instead(tmp_path: Path) -> None:
    made = plan(tmp_path, FarmOptions(), redis_url="redis://r:1/0", database_url="postgresql://d/f")
    names = [unit.name for unit in made.units()]
    assert names == ["schema", "worker-1", "web"]
    assert {need for unit in made.units() for need in unit.needs} == {"schema"}
    assert made.units()[1].environment["FARMHAND_REDIS_URL"] == "redis://r:1/0"


def test_a_whole_farm_waits_for_its_own_servers(tmp_path: Path) -> None:
    made = plan(tmp_path, FarmOptions(workers=2, hosts=3, machine_profile="l4"))
    units = {unit.name: unit for unit in made.units()}
    assert list(units) == ["redis", "postgres-data", "postgres", "schema", "worker-1", "worker-2", "web"]
    assert set(units["worker-2"].needs) == {"redis", "schema"}
    assert units["web"].environment["FARMHAND_HOSTS"] == "3"
    assert units["web"].environment["FARMHAND_MACHINE_PROFILE"] == "l4"


def test_passwords_are_among_no_arguments(tmp_path: Path) -> None:
    made = plan(tmp_path, FarmOptions())
    assert made.redis is not None
    password = made.redis.url.partition(":")[2].partition("@")[0].removeprefix("//:")
    words = [word for unit in (*made.units(), made.flower_unit()) for word in unit.command()]
    assert len(password) > 20
    assert not any(password in word for word in words)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(farm.EXTRAS, "worker", ("no_such_module",))
    with pytest.raises(SetupError, match="no_such_module is not installed: install farmhand with the extra 'worker'"):
        farm.check_installed(flower=True)


def test_one_port_for_two_is_refused() -> None:
    with pytest.raises(SetupError, match="port 8080 is wanted by the API and by Flower"):
        farm.check_ports_differ(FarmOptions(port=8080, flower_port=8080))
    farm.check_ports_differ(FarmOptions(port=8080, flower_port=8080, has_flower=False))


def test_a_machine_profile_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="FARMHAND_MACHINE_PROFILE"):
        up(FarmOptions(machine_profile="A B"), tmp_path / "farm", Screen())
    assert not (tmp_path / "farm").exists()


@pytest.mark.parametrize("words", [["up", "--hosts", "none"], ["up", "--port", "0"], ["up", "--workers", "0"]])
def test_bad_options_are_refused(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 2


def test_the_demo_model_is_found_without_importing_it() -> None:
    spec = demo_spec()
    assert (spec.id, spec.dims) == (DEMO_MODEL, {"dense": 384})
