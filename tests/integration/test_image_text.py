"""CLIP and SigLIP against transformers itself, which runs in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelLoadError, RequestError
from config_db.model_folders import spec_of_directory
from tasks import codec
from tasks.messages import INLINE_BODY_BYTES, Request
from tests import pictures
from tests.live import LiveFarm
from tests.services import wait_until
from tests.web import Web, start_web, stop_web
from workers.host.copies import Copies
from workers.host.families.clip import ClipFamily
from workers.host.families.image_text import ImageTextFamily, ImageTextModel
from workers.host.families.protocol import Device
from workers.host.families.siglip import SiglipFamily

pytestmark = pytest.mark.filterwarnings("ignore:::PIL.*")  # as where it is served
ROOT = Path(__file__).resolve().parents[2]
KINDS = ("clip", "clip-legacy", "siglip", "siglip2")
TEXTS = [
    "the cow and an owl sit on a barn roof",
    "",
    "  Spaces, around!  ",
    "Ünïcödé and 漢字 and emoji 🙂",
    *("a " * length for length in range(1, 24)),
    "quick brown foxes jump over lazy dogs 0123456789 " * 4,
]
FILES = pictures.files()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models of ``KINDS``, as folders, with what transformers says of ``TEXTS`` and ``FILES`` (sorted by name)."""
    out = tmp_path_factory.mktemp("image-text")
    (out / "texts.json").write_text(json.dumps(TEXTS))
    (out / "files").mkdir()
    for name, data in FILES.items():
        (out / "files" / name).write_bytes(data)
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.tiny_images", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return out


def family(kind: str) -> ImageTextFamily:
    return ClipFamily() if kind.startswith("clip") else SiglipFamily()


def load(folder: Path, *, pass_tokens: int = 64, **changes: Any) -> ImageTextModel:
    spec = msgspec.structs.replace(spec_of_directory(folder), **{"precision": "float32", **changes})
    return family(folder.name).load(spec, folder, Device(pass_tokens=pass_tokens))


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tiny: Path) -> Path:
    return tiny / str(request.param)


def answer(model: ImageTextModel, *requests: Request) -> list[Any]:
    prepared = model.prepare("encode", requests)
    answers = model.finish(prepared, model.run(prepared))
    return [msgspec.msgpack.decode(one) if isinstance(one, bytes) else one for one in answers]


def image_item(data: bytes, **rest: Any) -> dict[str, Any]:
    return {"images": [{"data": data, "format": "jpeg"}], **rest}


def encode(model: ImageTextModel, items: list[Any], **rest: Any) -> npt.NDArray[Any]:
    (answered,) = answer(model, Request(items=items, **rest))
    return np.stack([codec.array_of(item["dense"]["values"]) for item in answered])


def text_items() -> list[Any]:
    return [{"text": text} for text in TEXTS]


def image_items() -> list[Any]:
    return [image_item(FILES[name]) for name in sorted(FILES)]


def test_texts_and_images_agree_with_transformers(folder: Path) -> None:
    """Over every truncation edge, size, format and mode, many to a pass and mixed in one request."""
    model = load(folder)
    expected = np.concatenate([np.load(folder / "texts.npy"), np.load(folder / "images.npy")])
    for part in (np.load(folder / "texts.npy"), np.load(folder / "images.npy")):
        assert np.corrcoef(part).min() < 0.9  # else anything would agree
    order = np.random.default_rng(0).permutation(len(expected))
    items = [*text_items(), *image_items()]
    np.testing.assert_allclose(encode(model, [items[place] for place in order]), expected[order], atol=1e-4, rtol=1e-4)


def test_batch_mates_change_nothing_beyond_rounding(folder: Path) -> None:
    model = load(folder, pass_tokens=2048)
    items = [*text_items(), *image_items()]
    alone = np.concatenate([encode(model, [item]) for item in items])
    np.testing.assert_allclose(encode(model, items), alone, atol=1e-5)


def test_vectors_are_of_unit_length_where_model_or_request_says_so(tiny: Path) -> None:
    folder = tiny / "clip"
    plain, unit = load(folder), load(folder, normalize=True)
    raw = np.load(folder / "images.npy")
    expected = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(encode(unit, image_items()), expected, atol=1e-5)
    np.testing.assert_allclose(encode(plain, image_items(), options={"normalize": True}), expected, atol=1e-5)
    np.testing.assert_allclose(encode(unit, image_items(), options={"normalize": False}), raw, atol=1e-4)


def test_texts_are_worded_and_images_are_not(tiny: Path) -> None:
    worded = load(tiny / "clip", templates={"document": "a {text}"}, prompts={})
    plain = load(tiny / "clip")
    np.testing.assert_allclose(encode(worded, ["cow"]), encode(plain, ["a cow"]), atol=1e-6)
    np.testing.assert_allclose(encode(worded, image_items()), encode(plain, image_items()), atol=1e-6)


def test_what_was_measured_counts_texts_as_they_are_and_images_by_patches(tiny: Path) -> None:
    for kind, patches in (("clip", 16), ("siglip2", 16)):
        requests = [Request(items=[{"text": "a a a"}]), Request(items=[image_item(FILES["wide"])] * 2)]
        tokens = load(tiny / kind).prepare("encode", requests).request_tokens
        assert tokens[0] < 8  # not the padding that SigLIP asks for
        assert tokens[1] == 2 * patches


BAD_ITEMS: list[tuple[str, Any, str, str]] = [
    ("neither text nor image", {}, "items[1]", "a text, as a string, or an image"),
    ("both", {"text": "a", **image_item(FILES["png"])}, "items[1].images", "not both"),
    ("two images", {"images": [{"data": FILES["png"]}] * 2}, "items[1].images", "one image, not 2"),
    ("images of the wrong type", {"images": "x"}, "items[1].images", "list of maps"),
    ("an image of the wrong type", {"images": ["x"]}, "items[1].images", "list of maps"),
    ("data of the wrong type", image_item("x"), "items[1].images[0].data", "bytes"),  # type: ignore[arg-type]
    ("no data", image_item(b""), "items[1].images[0].data", "no image that can be read"),
    ("a document", image_item(b"%PDF-1.7\n"), "items[1].images[0].data", "no image that can be read"),
    ("a format not read", image_item(pictures.saved(pictures.picture(), "PPM")), "items[1].images[0].data", "jpeg"),
    ("cut off", image_item(FILES["jpeg"][:-200]), "items[1].images[0].data", "damaged"),
]


@pytest.mark.parametrize(
    ("item", "param", "words"), [case[1:] for case in BAD_ITEMS], ids=[case[0] for case in BAD_ITEMS]
)
def test_a_bad_item_is_named_and_hurts_no_other_request(
    clip: ImageTextModel, item: Any, param: str, words: str
) -> None:
    good = Request(items=[image_item(FILES["png"], id="g")])
    answers = answer(clip, good, Request(items=[{"text": "a"}, item, {"text": "b"}]), good)
    refused = answers[1]
    assert isinstance(refused, RequestError)
    assert (refused.code, refused.param) == ("INVALID_INPUT", param)
    assert words in refused.message
    assert [one["index"] for one in refused.details["items"]] == [1]
    for one in (answers[0], answers[2]):
        assert one[0]["id"] == "g"
        np.testing.assert_allclose(
            codec.array_of(one[0]["dense"]["values"]), encode(clip, [image_item(FILES["png"])])[0], atol=1e-5
        )


@pytest.fixture(scope="session")
def clip(tiny: Path) -> ImageTextModel:
    return load(tiny / "clip")


def test_a_model_comes_back_from_eviction_as_it_was_and_shares_no_weights(folder: Path, tmp_path: Path) -> None:
    items = [*text_items()[:6], *image_items()[:4]]
    spec = msgspec.structs.replace(spec_of_directory(folder), precision="float32")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    loader = family(folder.name)
    vectors = []
    for place in (folder, other, folder, other):
        model = loader.load(msgspec.structs.replace(spec, id=place.name), place, Device())
        vectors.append(encode(model, items))
        model.close()
    assert not np.allclose(vectors[0], vectors[1], atol=1e-2)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[1], vectors[3])


def test_weights_that_were_converted_once_are_kept_as_they_run(folder: Path, tmp_path: Path) -> None:
    """Another host maps the copy: it needs neither the check run nor the numbers of the folder any more."""
    place, copies = tmp_path / folder.name, Copies(tmp_path / "copies", 2**30)
    shutil.copytree(folder, place)
    spec = msgspec.structs.replace(spec_of_directory(place), precision="bfloat16")
    items = [*text_items()[:6], *image_items()[:4]]
    model = family(folder.name).load(spec, place, Device(copies=copies))
    before = encode(model, items)
    wait_until(lambda: any((tmp_path / "copies").glob("*.safetensors")), 10, "the copy to be kept")
    weights, found = place / "model.safetensors", (place / "model.safetensors").stat()
    data = bytearray(weights.read_bytes())
    data[-1000:] = bytes(1000)
    weights.write_bytes(data)
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    again = family(folder.name).load(spec, place, Device(copies=copies))
    np.testing.assert_array_equal(encode(again, items), before)
    np.testing.assert_array_equal(encode(model, items), before)
    assert not np.array_equal(encode(family(folder.name).load(spec, place, Device()), items), before)
    for one in (model, again):
        one.close()


def test_half_precision_is_what_was_asked_for_and_close(folder: Path) -> None:
    model = load(folder, precision="bfloat16")
    assert {one.dtype for one in model._module.parameters()} == {torch.bfloat16}
    expected = np.concatenate([np.load(folder / "texts.npy"), np.load(folder / "images.npy")])
    found = encode(model, [*text_items(), *image_items()])
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    assert ((found * expected).sum(axis=1) / norms).min() > 0.99


def test_a_folder_of_sentence_transformers_is_the_model_within(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "clip", tmp_path / "0_CLIPModel")
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    spec = msgspec.structs.replace(spec_of_directory(tmp_path), precision="float32")
    assert (spec.family, spec.max_length) == ("clip", 20)
    model = ClipFamily().load(spec, tmp_path, Device())
    np.testing.assert_allclose(encode(model, image_items()), np.load(tiny / "clip" / "images.npy"), atol=1e-4)


def _change(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_change("config.json", model_type="blip"), "model_type 'blip'"),
        (_change("preprocessor_config.json", image_processor_type="OtherImageProcessor"), "'OtherImageProcessor'"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors"),
        (_drop_a_weight, "visual_projection"),
        (
            lambda folder: (folder / "modules.json").write_text('[{"type": "x.CLIPModel"}, {"type": "x.Dense"}]'),
            "modules",
        ),
    ],
)
def test_a_folder_that_cannot_be_served_rightly_is_refused(
    tiny: Path, tmp_path: Path, spoil: Callable[[Path], Any], words: str
) -> None:
    spec = spec_of_directory(tiny / "clip")
    folder = tmp_path / "clip"
    shutil.copytree(tiny / "clip", folder)
    spoil(folder)
    with pytest.raises(ModelLoadError) as refused:
        ClipFamily().load(spec, folder, Device())
    assert words in refused.value.message
    assert refused.value.details == {"error_class": "CONFIG", "permanent": True}


def test_an_image_processor_that_does_not_fit_its_model_fails_the_load(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "clip", tmp_path / "clip")
    _change("preprocessor_config.json", crop_size={"height": 48, "width": 48})(tmp_path / "clip")
    with pytest.raises(ValueError, match="48"):
        load(tmp_path / "clip")


@pytest.fixture
def served(tiny: Path, redis_url: str, database_url: str, tmp_path: Path) -> Iterator[Web]:
    """The whole farm with one worker, serving all of ``KINDS`` as they are, and a text model that is not there."""
    farm = LiveFarm(redis_url, database_url, tmp_path)
    specs = [spec_of_directory(tiny / kind) for kind in KINDS]
    named = [
        msgspec.structs.replace(spec, id=f"org/{kind}", precision="float32")
        for kind, spec in zip(KINDS, specs, strict=True)
    ]
    farm.add_models(*named)
    farm.start_worker(batch_max_tokens=1024)
    web = start_web(redis_url, tmp_path, (), DATABASE_URL=database_url)
    wait_until(lambda: web.http.get("/readyz").status_code == 200, 10, "the farm to be ready")
    yield web
    stop_web(web)
    farm.close()


def test_texts_and_images_are_served_over_http(tiny: Path, served: Web) -> None:
    """In JSON and msgpack, mixed, cut over several micro-batches, with what was used; errors name the item."""
    as_msgpack = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
    for kind in KINDS:
        images, texts = np.load(tiny / kind / "images.npy"), np.load(tiny / kind / "texts.npy")
        expected = np.concatenate([texts[:3], images])
        items = [*text_items()[:3], *image_items()]
        body = msgspec.msgpack.encode({"items": items})
        answer = served.http.post(f"/v1/encode/org/{kind}", content=body, headers=as_msgpack)
        assert answer.status_code == 200, answer.text
        told = msgspec.msgpack.decode(answer.content)
        found = np.stack([codec.array_of(one["dense"]["values"]) for one in told["items"]])
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
        assert told["usage"]["images"] == len(images)
        assert answer.headers["X-SIE-Units-Images"] == str(len(images))
        plain = msgspec.json.encode({"items": [items[3], items[0]]})
        answer = served.http.post(f"/v1/encode/org/{kind}", content=plain, headers={"Content-Type": "application/json"})
        found = np.array([one["dense"]["values"] for one in answer.json()["items"]])
        np.testing.assert_allclose(found, expected[[3, 0]], atol=1e-4, rtol=1e-4)
        assert answer.json()["usage"]["images"] == 1
    items = [image_item(data) for data in (FILES["png"], FILES["webp"], FILES["bmp"])] * 6
    items[16] = image_item(FILES["jpeg"][:-200])
    answer = served.http.post("/v1/encode/org/clip", content=msgspec.json.encode({"items": items}))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["items"][0]["index"]) == ("items[16].images[0].data", 16)
    assert "damaged" in error["message"]
    large = image_item(pictures.saved(pictures.noise(900, 700)))  # travels by a key of its own
    assert len(large["images"][0]["data"]) > INLINE_BODY_BYTES
    answer = served.http.post("/v1/encode/org/clip", content=msgspec.json.encode({"items": [large]}))
    found = [answer.json()["items"][0]["dense"]["values"]]
    np.testing.assert_allclose(found, encode(load(tiny / "clip"), [large]), atol=1e-4)
    texts_only = served.http.post("/v1/encode/org/clip", json={"items": [{"text": "a"}]})
    assert "images" not in texts_only.json()["usage"]
