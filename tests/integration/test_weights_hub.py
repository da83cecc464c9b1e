"""Weights from a Hub that is there, refuses, hangs, breaks off or gives other bytes than it promised."""

from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Final

import msgspec
import pytest

from common.errors import ModelLoadError
from config_db.spec import EncoderSource, Source
from tests.hub import COMMIT, GATED, HubStandIn, Refusal, serving_hub
from tests.services import free_port, wait_until
from tests.weights import (
    FILES,
    NEEDED,
    PINNED,
    REPOSITORY,
    WEIGHTS,
    ask_here,
    begin,
    contents,
    setup_in,
    store_of,
)
from workers.weights.resolve import resolve
from workers.weights.setup import WeightsSetup

FILE_LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serving_hub() as stand_in:
        ask_here(stand_in, monkeypatch)
        yield stand_in


def refused(source: Source, setup: WeightsSetup) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as caught:
        resolve(source, setup)
    return caught.value


def is_partial_only(directory: Path) -> bool:
    """Whether nothing was published."""
    return not list(store_of(directory).glob("hub/*/*"))


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_what_the_hub_gave_is_whole_and_never_asked_for_again(
    hub: HubStandIn, tmp_path: Path, revision: str | None
) -> None:
    source, setup = Source(hub=REPOSITORY, revision=revision), setup_in(tmp_path)
    with resolve(source, setup) as files:
        found = contents(files.path)
    assert found.keys() == NEEDED
    assert found["model.safetensors"] == WEIGHTS
    assert sorted(hub.fetched) == [(name, start, stop) for name, start, stop in parts_of_weights()]
    asked = len(hub.asked)
    for again in (source, PINNED):
        with resolve(again, setup) as files:
            assert contents(files.path) == found
    assert len(hub.asked) == asked


def parts_of_weights() -> list[tuple[str, int, int]]:
    name = "model.safetensors"
    return [(name, 0, 100_000), (name, 100_000, 200_000), (name, 200_000, len(WEIGHTS))]


def test_what_another_tool_put_into_the_hub_cache_is_used(hub: HubStandIn, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--farm--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes(b"{}")
    with resolve(Source(hub=REPOSITORY), setup_in(tmp_path)) as files:
        assert files.path == snapshot
    assert not hub.asked


def test_a_server_without_ranges_gives_the_same(hub: HubStandIn, tmp_path: Path) -> None:
    hub.knows_ranges = False
    with resolve(PINNED, setup_in(tmp_path)) as files:
        assert (files.path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_download_that_breaks_off_goes_on_where_it_ended(hub: HubStandIn, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = [30_000, 0, 10_000]
    with resolve(PINNED, setup_in(tmp_path, part_bytes=1 << 20)) as files:
        assert (files.path / "model.safetensors").read_bytes() == WEIGHTS
    assert [start for _, start, _ in hub.fetched] == [0, 30_000, 30_000, 40_000]
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_a_download_that_always_breaks_off_is_given_up_and_never_used(hub: HubStandIn, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = [0] * 100
    error = refused(PINNED, setup_in(tmp_path, timeout_s=1.0))
    assert (error.details["error_class"], error.details["permanent"]) == ("NETWORK", False)
    assert is_partial_only(tmp_path)


def test_a_slow_hub_is_given_up_in_time_and_gone_on_with(hub: HubStandIn, tmp_path: Path) -> None:
    hub.stalls["model.safetensors"] = 1000
    started = monotonic()
    error = refused(PINNED, setup_in(tmp_path, timeout_s=1.0, silence_s=0.4))
    assert monotonic() - started < 5
    assert error.details["error_class"] in ("NETWORK", "TIMEOUT")
    hub.stalls.clear()
    with resolve(PINNED, setup_in(tmp_path)) as files:
        assert (files.path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("file", ["model.safetensors"])
def test_wrong_bytes_are_fetched_once_more(hub: HubStandIn, tmp_path: Path, file: str) -> None:
    hub.spoilt[file] = 1
    with resolve(PINNED, setup_in(tmp_path)) as files:
        assert (files.path / file).read_bytes() == WEIGHTS


def test_bytes_that_stay_wrong_are_never_used(hub: HubStandIn, tmp_path: Path) -> None:
    hub.spoilt["model.safetensors"] = 1000
    error = refused(PINNED, setup_in(tmp_path))
    assert (error.details["error_class"], error.details["permanent"]) == ("NETWORK", False)
    assert "digest" in error.message
    assert is_partial_only(tmp_path)


def test_a_small_file_that_git_keeps_is_verified_too(hub: HubStandIn, tmp_path: Path) -> None:
    class Changing(dict[str, object]):
        """Other content than it was listed with."""

        listed = False

        def __getitem__(self, name: str) -> object:
            return {"model_type": "evil"} if name == "config.json" else super().__getitem__(name)

    hub.repositories[REPOSITORY] = Changing(FILES)
    error = refused(PINNED, setup_in(tmp_path))
    assert "config.json" in error.message
    assert "digest" in error.message


def test_a_gated_repository_asks_for_a_token_and_takes_it(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.token = "hf_secretSecretSecret"  # noqa: S105 - of nobody
    error = refused(PINNED, setup_in(tmp_path))
    assert (error.details["error_class"], error.details["permanent"]) == ("GATED", True)
    assert "HF_TOKEN" in str(error.details["remedy"])
    monkeypatch.setenv("HF_TOKEN", hub.token)
    resolve(PINNED, setup_in(tmp_path)).release()  # the weights' own host refuses requests that bring the token along
    assert hub.token not in "".join(capfd.readouterr())


def test_a_repository_gated_at_its_files_is_said_so(hub: HubStandIn, tmp_path: Path) -> None:
    hub.files_refused[REPOSITORY] = GATED
    assert refused(PINNED, setup_in(tmp_path)).details["error_class"] == "GATED"


@pytest.mark.parametrize("source", [Source(hub="farm/none"), Source(hub=REPOSITORY, revision="v9")])
def test_an_unknown_repository_or_revision_is_not_found_for_good(
    hub: HubStandIn, tmp_path: Path, source: Source
) -> None:
    error = refused(source, setup_in(tmp_path))
    assert (error.details["error_class"], error.details["permanent"]) == ("NOT_FOUND", True)
    tiers = ["this worker's disk", "the Hub cache", f"the Hub ({hub.url})"]
    assert error.details["tried"] == tiers


def test_a_name_no_repository_can_have_is_said_so(tmp_path: Path) -> None:
    error = refused(Source(hub="a/b/c"), setup_in(tmp_path))
    assert (error.details["error_class"], error.details["permanent"]) == ("CONFIG", True)


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(
    hub: HubStandIn, tmp_path: Path
) -> None:
    hub.repositories[REPOSITORY] = {"config.json": {}, "pytorch_model.bin": b"code"}
    error = refused(PINNED, setup_in(tmp_path))
    assert (error.details["error_class"], error.details["permanent"]) == ("CONFIG", True)
    assert not any("/resolve/" in path for path in hub.asked)


def test_patience_that_the_hub_asks_for_is_had_within_the_deadline(hub: HubStandIn, tmp_path: Path) -> None:
    hub.refusals = [Refusal(429, {"Retry-After": "1"})]
    started = monotonic()
    resolve(PINNED, setup_in(tmp_path, part_bytes=1 << 20)).release()
    assert monotonic() - started >= 1


@pytest.mark.parametrize("headers", [{"Retry-After": "77"}, {"RateLimit": '"resolvers";r=0;t=77'}])
def test_more_patience_than_there_is_time_is_handed_on(
    hub: HubStandIn, tmp_path: Path, headers: dict[str, str]
) -> None:
    hub.refusals = [Refusal(429, headers)] * 9
    error = refused(PINNED, setup_in(tmp_path))
    assert error.retry_after_s == 77
    assert (error.details["error_class"], error.details["permanent"]) == ("NETWORK", False)


@pytest.mark.parametrize("revision", [None, COMMIT])
@pytest.mark.parametrize("away", ["refuses", "hangs", "fails"])
def test_a_hub_that_is_away_is_given_up_soon(
    hub: HubStandIn, tmp_path: Path, away: str, revision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fails = away == "fails"
    if away == "hangs":
        hub.silent.add(REPOSITORY)
    if away == "refuses":
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    started = monotonic()
    error = refused(Source(hub=REPOSITORY, revision=revision), setup_in(tmp_path, silence_s=0.5))
    assert monotonic() - started < 5
    assert (error.details["error_class"], error.details["permanent"]) == ("NETWORK", False)


def test_a_machine_that_is_told_to_stay_offline_says_so(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(PINNED, setup_in(tmp_path))
    assert (error.details["error_class"], error.details["permanent"]) == ("NETWORK", False)
    assert "HF_HUB_OFFLINE" in error.message
    assert not hub.asked


def test_signed_urls_and_tokens_are_kept_out_of_errors(hub: HubStandIn, tmp_path: Path) -> None:
    hub.refusals = [Refusal(500)] * 100
    error = refused(PINNED, setup_in(tmp_path, timeout_s=1.0))
    assert "Signature" not in error.message


def test_processes_that_want_the_same_model_fetch_it_once(hub: HubStandIn, tmp_path: Path) -> None:
    searches = [begin(PINNED, setup_in(tmp_path), hub) for _ in range(2)]
    paths = {search.answer()["path"] for search in searches}
    assert len(paths) == 1
    assert sorted(hub.fetched) == parts_of_weights()
    for search in searches:
        search.end()


def test_a_fetch_that_is_killed_is_gone_on_with_by_another_process(hub: HubStandIn, tmp_path: Path) -> None:
    def has_noted() -> bool:
        """Whether a part of the weights is whole: the fourth file, as they are listed."""
        return any("3 0 100000\n" in note.read_text() for note in store_of(tmp_path).glob("partial/*/journal"))

    hub.stalls["model.safetensors"] = 150_000  # a whole part comes, and half of the next
    first = begin(PINNED, setup_in(tmp_path, connections=1), hub)
    wait_until(has_noted, 20, "a part to be whole")
    second = begin(PINNED, setup_in(tmp_path, connections=1), hub)
    assert is_partial_only(tmp_path)
    first.kill()
    hub.stalls.clear()
    found = Path(second.answer()["path"])
    assert (found / "model.safetensors").read_bytes() == WEIGHTS
    assert [start for _, start, _ in hub.fetched].count(0) == 1
    second.end()


@pytest.mark.parametrize("first", [FILE_LIMIT, FILE_LIMIT + "; import os; os.posix_fallocate = lambda *_: None"])
def test_a_full_disk_is_said_so_and_leaves_nothing_behind(hub: HubStandIn, tmp_path: Path, first: str) -> None:
    """Seen when the space is claimed, or, where a file system cannot promise it, when the bytes come."""
    search = begin(PINNED, setup_in(tmp_path), hub, first=first)
    error = search.answer()["error"]
    search.end()
    assert (error["error_class"], error["permanent"]) == ("STORAGE", False)
    assert "FARMHAND_WEIGHTS_DIR" in error["remedy"]
    assert contents(store_of(tmp_path) / "partial") == {}
    with resolve(PINNED, setup_in(tmp_path)) as files:
        assert contents(files.path).keys() == NEEDED


def test_a_directory_that_cannot_be_written_is_said_so(hub: HubStandIn, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = refused(PINNED, setup_in(tmp_path, directory=str(tmp_path / "file" / "store")))
    assert error.details["error_class"] == "STORAGE"
    assert not hub.fetched


PICKLED: dict[str, Any] = {
    "config.json": {"model_type": "bert"},
    "pytorch_model.bin": WEIGHTS,
    "head.pt": b"numbers",
    "optimizer.pt": None,
    "modeling.py": None,
}
PICKLE: Final = ("safetensors", "pickle")
ENCODER_WEIGHTS = {"model.safetensors": b"weights", "pytorch_model.bin": b"weights"}


def test_pickle_is_fetched_only_for_a_spec_that_trusts_it(hub: HubStandIn, tmp_path: Path) -> None:
    hub.repositories["farm/pickled"] = {name: one for name, one in PICKLED.items() if one is not None}
    source, setup = Source(hub="farm/pickled", revision=COMMIT), setup_in(tmp_path)
    for _ in range(2):  # also when the files have come for another spec
        error = refused(source, setup)
        assert (error.details["error_class"], error.details["permanent"]) == ("CONFIG", True)
        assert "trust `pickle`" in error.details["remedy"]
        with resolve(source, setup, formats=PICKLE) as files:
            assert contents(files.path).keys() == {"config.json", "pytorch_model.bin", "head.pt"}
            assert (files.path / "pytorch_model.bin").read_bytes() == WEIGHTS
    with resolve(PINNED, setup, formats=PICKLE) as files:  # of weights in both formats, those that can run no code
        assert contents(files.path).keys() == NEEDED


def test_config_and_tokenizer_of_an_encoder_come_with_the_model(hub: HubStandIn, tmp_path: Path) -> None:
    """At the revision that the source names, into the same folder; of its weights not a byte."""
    hub.repositories["other/encoder"] = {"config.json": {"model_type": "bert"}, "spm.model": b"x", **ENCODER_WEIGHTS}
    source = msgspec.structs.replace(PINNED, encoders=(EncoderSource(hub="other/encoder", revision="v1"),))
    with resolve(source, setup_in(tmp_path)) as files:
        beside = {f"encoders/other/encoder/{name}" for name in ("config.json", "spm.model")}
        assert contents(files.path).keys() == NEEDED | beside
        assert (files.path / "encoders" / "other" / "encoder" / "spm.model").read_bytes() == b"x"
    asked = len(hub.asked)
    with resolve(PINNED, setup_in(tmp_path)) as files:  # another folder: it was not asked to have them
        assert contents(files.path).keys() == NEEDED
    assert len(hub.asked) > asked
    asked = len(hub.asked)
    resolve(source, setup_in(tmp_path)).release()
    assert len(hub.asked) == asked
    gone = msgspec.structs.replace(PINNED, encoders=(EncoderSource(hub="nobody/encoder", revision="v1"),))
    assert refused(gone, setup_in(tmp_path)).details["error_class"] == "NOT_FOUND"
