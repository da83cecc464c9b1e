"""Where model files come from when they are local: only from under the allowed roots."""

from pathlib import Path

import pytest

from common.errors import ModelLoadError
from config_db.spec import Source
from workers.weights.manifest import chosen, is_wanted
from workers.weights.resolve import resolve
from workers.weights.setup import WeightsSetup


def local(path: Path, *roots: Path) -> Path:
    with resolve(Source(path=str(path)), WeightsSetup(model_dirs=tuple(map(str, roots)))) as files:
        return files.path


def test_a_directory_under_an_allowed_root_is_taken(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    assert local(tmp_path / "models" / "a", tmp_path / "other", tmp_path / "models") == tmp_path / "models" / "a"


@pytest.mark.parametrize("path", ["models-of-others/a", "models/link", "models/linked/a"])
def test_a_directory_elsewhere_is_refused_however_it_is_written(tmp_path: Path, path: str) -> None:
    for name in ("models", "models-of-others/a", "secret/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelLoadError, match="none of the allowed") as caught:
        local(tmp_path / path, tmp_path / "models")
    remedy = "name its root in FARMHAND_MODEL_DIRS"
    assert caught.value.details == {"error_class": "CONFIG", "permanent": True, "remedy": remedy}


def test_a_root_that_is_itself_a_link_allows_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    assert local(tmp_path / "models" / "a", tmp_path / "models") == tmp_path / "disk" / "a"


def test_a_directory_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no directory") as caught:
        local(tmp_path / "gone", tmp_path)
    assert caught.value.details["error_class"] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.safetensors", True),
        ("2_Dense/model.safetensors", True),
        ("chat_template.jinja", True),
        ("sentencepiece.bpe.model", True),
        ("../model.safetensors", False),
        ("/etc/config.json", False),
        ("a/../../config.json", False),
        ("pytorch_model.bin", False),
        ("modeling.py", False),
        ("onnx/model_config.json", False),
        ("consolidated.00.safetensors", False),
    ],
)
def test_only_what_loading_needs_is_fetched_and_only_into_the_folder(name: str, wanted: bool) -> None:
    assert is_wanted(name) == wanted


def test_pickle_is_chosen_where_it_is_trusted_and_stands_alone() -> None:
    names = [
        *("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "head.pt"),
        *("a/pytorch_model.bin", "a/model.safetensors", "b/head.safetensors", "b/head.pt", "optimizer.pt", "x.bin"),
    ]
    assert chosen(names) == {"config.json", "a/model.safetensors", "b/head.safetensors"}
    assert chosen(names, ("safetensors", "pickle")) == {*names[:4], "a/model.safetensors", "b/head.safetensors"}
    assert chosen(names, ()) == {"config.json"}
