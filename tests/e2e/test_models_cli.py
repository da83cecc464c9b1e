"""``farmhand models``: weights fetched ahead, listed and removed, each command as an operator runs it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config_db.spec import Source
from tests.e2e.farms import farmhand
from tests.hub import COMMIT, HubStandIn, serving_hub
from tests.weights import FILES, KEYS, REPOSITORY, begin, serving_buckets, setup_in, store_of

CATALOGUE = f"""
models:
- {{id: tiny, family: dense, source: {{hub: {REPOSITORY}, revision: {COMMIT}}}, dims: {{dense: 8}}}}
"""
SOURCE = f"hub:{REPOSITORY}@{COMMIT}"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with serving_hub() as stand_in:
        stand_in.repositories |= {REPOSITORY: FILES, "farm/other": FILES}
        yield stand_in


@pytest.fixture
def here(hub: HubStandIn, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine that asks this Hub."""
    own = {"FARMHAND_HUB_CACHE": str(setup_in(tmp_path).hub_cache), "HF_HOME": str(tmp_path / "home")}
    return {**own, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secretSecret", "NO_PROXY": "*"}


def test_a_served_model_is_fetched_listed_and_removed(here: dict[str, str], tmp_path: Path, database_url: str) -> None:
    (tmp_path / "catalogue").mkdir()
    (tmp_path / "catalogue" / "models.yaml").write_text(CATALOGUE)
    here["FARMHAND_DATABASE_URL"] = database_url
    farmhand("config", "apply", str(tmp_path / "catalogue"), **here)
    for words in (("models",), ("models", "list")):
        assert farmhand(*words, **here).stdout == f"tiny\tdense\tencode\t{SOURCE}\n"
    fetched = farmhand("models", "prefetch", "tiny", **here)
    assert (fetched.returncode, fetched.stderr) == (0, "")
    assert re.fullmatch(r"tiny: 293\.\d KiB in \S+\n", fetched.stdout)
    (line,) = farmhand("models", "cache", **here).stdout.splitlines()
    source, size, used, state = line.split("\t")
    assert (source, size, state) == (SOURCE, fetched.stdout.split(" in ")[0].removeprefix("tiny: "), "-")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", used)
    assert farmhand("models", "prune", SOURCE, **here).stdout.endswith("KiB freed\n")
    assert farmhand("models", "cache", **here).stdout == ""


def test_what_cannot_be_served_is_listed_apart_and_not_fetched(
    here: dict[str, str], tmp_path: Path, database_url: str
) -> None:
    refused = "- {id: org/hears, family: whisper, source: {hub: org/hears}, unsupported: nothing hears here}\n"
    (tmp_path / "catalogue").mkdir()
    (tmp_path / "catalogue" / "models.yaml").write_text(CATALOGUE + refused)
    here["FARMHAND_DATABASE_URL"] = database_url
    farmhand("config", "apply", str(tmp_path / "catalogue"), **here)
    listed = farmhand("models", **here)
    assert listed.stdout == f"tiny\tdense\tencode\t{SOURCE}\n"
    assert "1 more cannot be served: " in listed.stderr
    told = farmhand("models", "list", "--unsupported", **here)
    assert told.stdout == "org/hears\twhisper\tnothing hears here\n"
    fetched = farmhand("models", "prefetch", "org/hears", **here)
    assert fetched.returncode == 1
    assert "cannot be served: nothing hears here" in fetched.stderr


def test_pruning_keeps_what_is_in_use_and_as_much_as_is_asked(
    hub: HubStandIn, here: dict[str, str], tmp_path: Path
) -> None:
    other = "hub:farm/other@main"
    assert farmhand("models", "prefetch", SOURCE, other, **here).returncode == 0
    assert farmhand("models", "prune", **here).stdout == "0 B freed\n"
    user = begin(Source(hub=REPOSITORY, revision=COMMIT), setup_in(tmp_path), hub)
    user.answer()
    listed = farmhand("models", "cache", **here).stdout.splitlines()
    assert [line.split("\t")[-1] for line in listed] == ["-", "in use"]
    kept = farmhand("models", "prune", SOURCE, **here)
    assert (kept.returncode, "a worker uses it" in kept.stdout) == (1, True)
    removed = farmhand("models", "prune", "--keep", "300KiB", **here).stdout
    assert removed.startswith(f"removed hub:farm/other@{COMMIT}, ")
    user.end()
    assert farmhand("models", "prune", "--all", **here).returncode == 0
    assert list(store_of(tmp_path).glob("hub/*/*")) == []


def test_prefetching_fills_the_bucket(here: dict[str, str]) -> None:
    with serving_buckets() as (_, url, client):
        client.create_bucket(Bucket="prefetched")
        here |= KEYS | {"FARMHAND_BUCKET": "s3://prefetched", "FARMHAND_BUCKET_ENDPOINT": url}
        assert farmhand("models", "prefetch", SOURCE, **here).returncode == 0
        keys = {one["Key"] for one in client.list_objects_v2(Bucket="prefetched")["Contents"]}
    assert f"hub/{REPOSITORY}/{COMMIT}/manifest.json" in keys
    assert f"hub/{REPOSITORY}/{COMMIT}/lease" not in keys


def test_what_cannot_be_fetched_is_one_line_each_and_the_rest_is(here: dict[str, str]) -> None:
    done = farmhand("models", "prefetch", "hub:farm/none@main", SOURCE, **here)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{SOURCE}: ")
    assert done.stderr.count("\n") == 1
    assert "knows no such repository" in done.stderr
    assert "hf_secretSecret" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", "x"), "no weights of 'x' are here"),
        (("prune", "--keep", "much"), "it must be a size"),
    ],
)
def test_what_cannot_be_pruned_is_one_line(here: dict[str, str], words: tuple[str, ...], said: str) -> None:
    done = farmhand("models", *words, **here)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert said in done.stderr


def test_bad_settings_are_one_line(here: dict[str, Any]) -> None:
    done = farmhand("models", "cache", **here, FARMHAND_BUCKET="farm")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "FARMHAND_BUCKET" in done.stderr
