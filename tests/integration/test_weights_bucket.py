"""Weights between the disk and the Hub: a bucket on a real S3 server, filled by whoever comes first."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest

from common.errors import ModelLoadError
from config_db.spec import EncoderSource, Source
from tests.hub import COMMIT, GATED, HubStandIn, serving_hub
from tests.services import free_port, wait_until
from tests.weights import (
    FILES,
    NEEDED,
    PINNED,
    PLACE,
    REPOSITORY,
    WEIGHTS,
    BucketServer,
    ask_here,
    begin,
    contents,
    serving_buckets,
    setup_in,
    store_of,
)
from workers.weights import resolve as module
from workers.weights.bucket import Bucket
from workers.weights.cluster_lease import ClusterLease
from workers.weights.resolve import resolve, tiers_of
from workers.weights.setup import WeightsSetup

FOLDER = f"farm/hub/{REPOSITORY}/{COMMIT}/"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with serving_hub() as stand_in:
        ask_here(stand_in, monkeypatch)
        monkeypatch.setattr(module, "POLL_S", 0.05)
        yield stand_in


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with serving_buckets() as serving:
        yield serving


@pytest.fixture
def bucket(server: Any) -> BucketServer:
    made = BucketServer(*server, name=f"weights-{uuid4().hex}")
    made.client.create_bucket(Bucket=made.name)
    return made


def fetch(setup: WeightsSetup, source: Source = PINNED) -> dict[str, bytes]:
    """Search, wait until the bucket has its due, and return what was found."""
    with resolve(source, setup) as files:
        found = contents(files.path)
    tiers_of(setup).wait_written_back()
    return found


def refused(source: Source, setup: WeightsSetup) -> ModelLoadError:
    with pytest.raises(ModelLoadError) as caught:
        resolve(source, setup)
    return caught.value


def opened(bucket: BucketServer) -> Bucket:
    return Bucket(bucket.uri, endpoint=bucket.url, silence_s=5, connections=2)


def test_the_first_worker_fills_the_bucket_and_the_next_takes_it_from_there(
    hub: HubStandIn, bucket: BucketServer, tmp_path: Path
) -> None:
    found = fetch(setup_in(tmp_path / "one", **bucket.settings()))
    assert found.keys() == NEEDED
    kept = bucket.objects()
    assert {key.removeprefix(f"{FOLDER}files/"): raw for key, raw in kept.items() if "/files/" in key} == found
    assert kept.keys() - {f"{FOLDER}files/{name}" for name in found} == {f"{FOLDER}manifest.json"}
    asked = len(hub.asked)
    assert fetch(setup_in(tmp_path / "two", **bucket.settings())) == found
    assert len(hub.asked) == asked


def test_two_machines_that_want_a_model_at_once_fetch_it_once_from_the_hub(
    hub: HubStandIn, bucket: BucketServer, tmp_path: Path
) -> None:
    searches = [begin(PINNED, setup_in(tmp_path / name, **bucket.settings()), hub) for name in ("one", "two")]
    paths = [Path(search.answer()["path"]) for search in searches]
    for path in paths:
        assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(start for _, start, _ in hub.fetched) == [0, 100_000, 200_000]
    for search in searches:
        search.end()


def test_a_worker_that_dies_with_the_lease_is_succeeded(hub: HubStandIn, bucket: BucketServer, tmp_path: Path) -> None:
    hub.stalls["model.safetensors"] = 1000
    dying = begin(PINNED, setup_in(tmp_path / "one", **bucket.settings(), lease_s=1.0), hub)
    wait_until(lambda: hub.sent.get("model.safetensors"), 20, "the first to fetch")
    dying.kill()
    assert f"{FOLDER}lease" in bucket.objects()
    hub.stalls.clear()
    assert fetch(setup_in(tmp_path / "two", **bucket.settings(), lease_s=1.0))["model.safetensors"] == WEIGHTS
    assert f"{FOLDER}manifest.json" in bucket.objects()
    assert f"{FOLDER}lease" not in bucket.objects()


def test_a_lease_is_held_by_one_and_kept_alive(bucket: BucketServer) -> None:
    place = opened(bucket)
    first, second, third = (ClusterLease(place, "lease", life_s=0.9) for _ in range(3))
    assert first.acquire()
    beats = {json.loads(seen.content)["beats"] for seen in iter_beats(place, 3)}
    assert len(beats) == 3
    assert not second.acquire()
    first.release()
    assert third.acquire()
    third.release()


def iter_beats(place: Bucket, count: int) -> list[Any]:
    """The lease as it stands, each time it has changed."""
    found: dict[str, Any] = {}

    def look() -> bool:
        seen = place.get("lease")
        assert seen is not None
        found[seen.etag] = seen
        return len(found) >= count

    wait_until(look, 10, "the lease to be renewed")
    return list(found.values())


def test_of_two_who_take_over_a_dead_lease_one_gets_it(bucket: BucketServer) -> None:
    place = opened(bucket)
    old = place.put_if("lease", b"old", etag=None)
    assert old is not None
    assert place.put_if("lease", b"first", etag=old) is not None
    assert place.put_if("lease", b"second", etag=old) is None
    assert place.put_if("lease", b"third", etag=None) is None


def test_one_who_waits_for_a_lease_gives_up_in_time(hub: HubStandIn, bucket: BucketServer, tmp_path: Path) -> None:
    bucket.put(f"{FOLDER}lease", b"{}")
    error = refused(PINNED, setup_in(tmp_path, **bucket.settings(), timeout_s=0.5))
    assert (error.details["error_class"], error.details["permanent"]) == ("TIMEOUT", False)
    assert not hub.fetched


def test_a_holder_that_is_refused_lets_the_lease_go(hub: HubStandIn, bucket: BucketServer, tmp_path: Path) -> None:
    hub.files_refused[REPOSITORY] = GATED
    error = refused(PINNED, setup_in(tmp_path, **bucket.settings()))
    assert error.details["error_class"] == "GATED"
    assert error.details["tried"] == [
        "this worker's disk",
        "the Hub cache",
        f"the bucket {bucket.uri}",
        f"the Hub ({hub.url})",
    ]
    assert bucket.objects() == {}


def test_what_lies_damaged_in_the_bucket_comes_from_the_hub_and_is_put_right(
    bucket: BucketServer, tmp_path: Path
) -> None:
    found = fetch(setup_in(tmp_path / "one", **bucket.settings()))
    bucket.put(f"{FOLDER}files/model.safetensors", WEIGHTS[::-1])
    assert fetch(setup_in(tmp_path / "two", **bucket.settings())) == found
    assert bucket.objects()[f"{FOLDER}files/model.safetensors"] == WEIGHTS


def test_a_bucket_that_is_away_costs_a_moment_and_the_hub_serves(hub: HubStandIn, tmp_path: Path) -> None:
    setup = setup_in(tmp_path, bucket="s3://gone/farm", bucket_endpoint=f"http://127.0.0.1:{free_port()}")
    started = monotonic()
    assert fetch(setup).keys() == NEEDED
    assert monotonic() - started < 10
    hub.repositories["farm/other"] = FILES
    fetch(setup, Source(hub="farm/other", revision=COMMIT))
    for name in ("tiny", "other"):
        assert (store_of(tmp_path) / f"hub/farm%2F{name}/{COMMIT}/owed").exists()


def test_what_was_owed_to_a_bucket_is_given_once_it_is_back(bucket: BucketServer, tmp_path: Path) -> None:
    away = setup_in(tmp_path, bucket=bucket.uri, bucket_endpoint=f"http://127.0.0.1:{free_port()}")
    found = fetch(away)
    assert bucket.objects() == {}
    assert fetch(setup_in(tmp_path, **bucket.settings())) == found
    assert f"{FOLDER}manifest.json" in bucket.objects()
    assert not (store_of(tmp_path) / PLACE / "owed").exists()


def test_both_away_is_an_error_that_names_both(hub: HubStandIn, tmp_path: Path) -> None:
    hub.fails = True
    setup = setup_in(tmp_path, bucket="s3://gone/farm", bucket_endpoint=f"http://127.0.0.1:{free_port()}")
    error = refused(PINNED, setup)
    assert (error.details["error_class"], error.details["permanent"]) == ("NETWORK", False)
    assert [tier.partition(" (")[0] for tier in error.details["tried"]] == [
        "this worker's disk",
        "the Hub cache",
        "the bucket s3://gone/farm",
        "the Hub",
    ]


# -- a bucket's folder as the source itself ---------------------------------------------------------------------------


def lay_model(bucket: BucketServer, prefix: str = "farm/mine/") -> None:
    for name, content in FILES.items():
        bucket.put(f"{prefix}{name}", content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.mark.parametrize("end", ["", "/"])
def test_a_model_may_lie_in_the_bucket(bucket: BucketServer, tmp_path: Path, end: str) -> None:
    lay_model(bucket)
    source, setup = Source(bucket=f"{bucket.uri}/mine{end}"), setup_in(tmp_path, **bucket.settings())
    found = fetch(setup, source)
    assert found.keys() == NEEDED
    assert found["model.safetensors"] == WEIGHTS
    for key in bucket.objects():
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    assert fetch(setup, source) == found


def test_a_folder_with_a_manifest_is_held_to_it(bucket: BucketServer, tmp_path: Path) -> None:
    found = fetch(setup_in(tmp_path / "one", **bucket.settings()))
    source = Source(bucket=f"{bucket.uri}/hub/{REPOSITORY}/{COMMIT}")
    assert fetch(setup_in(tmp_path / "two", **bucket.settings()), source) == found
    bucket.put(f"{FOLDER}files/model.safetensors", WEIGHTS[::-1])
    error = refused(source, setup_in(tmp_path / "three", **bucket.settings()))
    assert "digest" in error.message


@pytest.mark.parametrize("name", ["../../../../escaped.json", "/escaped.json", "pytorch_model.bin"])
def test_a_manifest_that_leads_elsewhere_is_not_followed(bucket: BucketServer, tmp_path: Path, name: str) -> None:
    files = [{"name": name, "size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}]
    manifest = json.dumps({"source": "hub:evil", "files": files}).encode()
    bucket.put(f"{FOLDER}manifest.json", manifest)
    bucket.put(f"{FOLDER}files/{name}", b"{}")
    error = refused(Source(bucket=f"{bucket.uri}/hub/{REPOSITORY}/{COMMIT}"), setup_in(tmp_path, **bucket.settings()))
    assert (error.details["error_class"], error.details["permanent"]) == ("CONFIG", True)
    assert fetch(setup_in(tmp_path, **bucket.settings())).keys() == NEEDED
    assert bucket.objects()[f"{FOLDER}manifest.json"] != manifest
    assert not list(tmp_path.rglob("escaped.json"))


def test_a_bucket_that_nobody_allowed_is_refused(bucket: BucketServer, tmp_path: Path) -> None:
    lay_model(bucket)
    other = Source(bucket=f"s3://{bucket.name}/farmer/mine")
    error = refused(other, setup_in(tmp_path, **bucket.settings()))
    assert (error.details["error_class"], error.details["permanent"]) == ("CONFIG", True)
    assert "FARMHAND_BUCKET_SOURCES" in error.message
    lay_model(bucket, "farmer/mine/")
    allowed = setup_in(tmp_path, bucket_endpoint=bucket.url, bucket_sources=(f"s3://{bucket.name}/farmer",))
    assert fetch(allowed, other).keys() == NEEDED


def test_a_bucket_source_that_is_not_there_or_away_is_said_so(bucket: BucketServer, tmp_path: Path) -> None:
    empty = refused(Source(bucket=f"{bucket.uri}/none"), setup_in(tmp_path, **bucket.settings()))
    assert (empty.details["error_class"], empty.details["permanent"]) == ("NOT_FOUND", True)
    gone = setup_in(tmp_path, bucket="s3://no-such-bucket-here", bucket_endpoint=bucket.url)
    missing = refused(Source(bucket="s3://no-such-bucket-here/a"), gone)
    assert (missing.details["error_class"], missing.details["permanent"]) == ("NOT_FOUND", True)
    away = setup_in(tmp_path, bucket=bucket.uri, bucket_endpoint=f"http://127.0.0.1:{free_port()}")
    error = refused(Source(bucket=f"{bucket.uri}/mine"), away)
    assert (error.details["error_class"], error.details["permanent"]) == ("NETWORK", False)


def test_what_a_spec_trusts_travels_through_the_bucket_and_nothing_else(
    hub: HubStandIn, bucket: BucketServer, tmp_path: Path
) -> None:
    """Pickle and the files of an encoder, for a second machine that asks the Hub for nothing."""
    hub.repositories["farm/pickled"] = {"config.json": {}, "pytorch_model.bin": WEIGHTS}
    hub.repositories["farm/encoder"] = {"config.json": {"model_type": "bert"}}
    encoder = EncoderSource(hub="farm/encoder", revision=COMMIT)
    source = Source(hub="farm/pickled", revision=COMMIT, encoders=(encoder,))
    found = []
    for name in ("one", "two"):
        setup, asked = setup_in(tmp_path / name, **bucket.settings()), len(hub.asked)
        with resolve(source, setup, formats=("safetensors", "pickle")) as files:
            found.append(contents(files.path))
        tiers_of(setup).wait_written_back()
    assert found[0] == found[1]
    assert found[0].keys() == {"config.json", "pytorch_model.bin", "encoders/farm/encoder/config.json"}
    assert len(hub.asked) == asked
    assert refused(Source(hub="farm/pickled", revision=COMMIT), setup).details["error_class"] == "CONFIG"
    bucket.put("farm/folder/config.json", b"{}")
    bucket.put("farm/folder/pytorch_model.bin", b"numbers")
    theirs = Source(bucket=f"{bucket.uri}/folder")
    assert "trust `pickle`" in refused(theirs, setup).message
    with resolve(theirs, setup, formats=("safetensors", "pickle")) as files:
        assert contents(files.path).keys() == {"config.json", "pytorch_model.bin"}
