"""Specs as YAML files: what is written reads back, whatever a person has put into it."""

from pathlib import Path

import pytest
from hypothesis import given

from config_db.catalog import read_catalog
from config_db.documents import parse, read_model
from config_db.export import file_paths, model_yaml, to_yaml
from config_db.spec import ModelSpec, Source
from tests.specs import contents, specs

ROOT = Path(__file__).resolve().parents[2]


def model(name: str, family: str = "dense") -> ModelSpec:
    return ModelSpec(id=name, family=family, source=Source(hub="a/b"))


@given(specs())
def test_a_model_reads_back_as_it_was_written(spec: ModelSpec) -> None:
    text = model_yaml(spec)
    assert read_model(parse(text.encode())) == spec
    assert model_yaml(read_model(parse(text.encode()))) == text


@given(contents)
def test_any_content_reads_back_as_it_was_written(content: object) -> None:
    assert parse(to_yaml({"x": content}).encode()) == {"x": content}


def test_the_whole_catalogue_reads_back() -> None:
    found = read_catalog(ROOT / "catalog")
    for spec in found:
        assert read_model(parse(model_yaml(spec).encode())) == spec


def test_fields_stand_in_the_order_of_the_spec_and_defaults_are_left_out() -> None:
    spec = ModelSpec(
        id="a/b",
        family="dense",
        source=Source(hub="a/b", revision="1234567"),
        aliases=("b",),
        operations=("encode", "score"),
        dims={"sparse": 3, "dense": 8},
        prompts={"query": "query: "},
        templates={"query": "first\nsecond {text}"},
        normalize=False,
    )
    assert model_yaml(spec, schema="../model.schema.json") == (
        "# yaml-language-server: $schema=../model.schema.json\n"
        "id: a/b\n"
        "family: dense\n"
        "source:\n"
        "  hub: a/b\n"
        "  revision: '1234567'\n"
        "aliases: [b]\n"
        "operations: [encode, score]\n"
        "dims:\n"
        "  dense: 8\n"
        "  sparse: 3\n"
        "normalize: false\n"
        "prompts:\n"
        "  query: 'query: '\n"
        "templates:\n"
        '  query: "first\\nsecond {text}"\n'
    )


@pytest.mark.parametrize(
    "text", ["yes", "no", "~", "1e5", "12e4567", "0o17", "1_000", "2020-01-01", "<<", "=", "", "0x1f"]
)
def test_text_that_looks_like_something_else_is_quoted(text: str) -> None:
    assert to_yaml({"revision": text}) == f"revision: '{text}'\n"


def test_models_stand_in_the_folders_of_the_catalogue() -> None:
    found = read_catalog(ROOT / "catalog")
    paths = file_paths(found)
    folders = {path.parent.name for path in (ROOT / "catalog").rglob("*.yaml")}
    assert {path.parts[0] for path in paths.values()} == folders
    for path in (ROOT / "catalog").rglob("*.yaml"):
        content = parse(path.read_bytes())
        assert paths[content["id"]].parts[0] == path.parent.name


def test_no_two_models_share_a_file_even_where_case_does_not_count() -> None:
    found = [model(name) for name in ("Org/Model", "org/model", "org--model", "org/other", "x" * 200, "a/" * 99 + "b")]
    paths = file_paths(found)
    assert len({str(path).lower() for path in paths.values()}) == len(found)
    assert str(paths["org/other"]) == "dense/org--other.yaml"
    assert max(len(path.name) for path in paths.values()) < 255
    assert file_paths(reversed(found)) == paths


def test_families_of_the_operator_have_a_folder_of_their_own() -> None:
    assert str(file_paths([model("a", "fake")])["a"]) == "fake/a.yaml"
