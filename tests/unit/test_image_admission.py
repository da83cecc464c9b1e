"""Images at the door: which requests go on to a host, and as what."""

from typing import Any

import msgspec
import pytest

from common.errors import RequestError
from common.settings import WebSettings
from config_db.spec import Input, Limits, ModelSpec, Source
from tasks.messages import Request, decode_body, encode_body
from tests import pictures
from webapp.admission import Admitted, admit_encode
from webapp.image_admission import MAX_IMAGE_BYTES, MAX_IMAGES, sniff
from webapp.wire.bodies import EncodeBody

PNG = pictures.saved(pictures.picture(8, 8))


def spec(*inputs: Input, max_items: int | None = None) -> ModelSpec:
    return ModelSpec(
        id="org/m", family="clip", source=Source(path="/m"), inputs=inputs, limits=Limits(max_items=max_items)
    )


def admitted(*items: Any, model: ModelSpec | None = None, as_msgpack: bool = True) -> Admitted:
    library: Any = msgspec.msgpack if as_msgpack else msgspec.json
    body = library.decode(library.encode({"items": list(items)}), type=EncodeBody)
    return admit_encode(model or spec("text", "image"), body, WebSettings())


def admit(*items: Any, model: ModelSpec | None = None, as_msgpack: bool = True) -> Request:
    return admitted(*items, model=model, as_msgpack=as_msgpack).request


def refusal(*items: Any, model: ModelSpec | None = None) -> RequestError:
    with pytest.raises(RequestError) as refused:
        admit(*items, model=model)
    return refused.value


def image(data: bytes = PNG, **rest: Any) -> dict[str, Any]:
    return {"images": [{"data": data, **rest}]}


@pytest.mark.parametrize("as_msgpack", [True, False])
def test_texts_and_images_go_to_the_host_as_they_are(as_msgpack: bool) -> None:
    """In JSON the bytes come as base64 and go on as bytes; the format that goes on is what the bytes say."""
    items = [{"text": "a", "id": "t"}, {**image(format="jpg"), "id": "i"}, image(), {"text": "b", "images": []}]
    _, request = decode_body(encode_body("org/m", admit(*items, as_msgpack=as_msgpack)))
    assert request.items == [
        {"text": "a", "id": "t"},
        {"images": [{"data": PNG, "format": "png"}], "id": "i"},
        {"images": [{"data": PNG, "format": "png"}]},
        {"text": "b"},
    ]


REFUSED: list[tuple[str, Any, str, str]] = [
    ("both", {"text": "a", **image()}, "items[1].images", "not both"),
    ("two", {"images": [{"data": PNG}] * 2}, "items[1].images", "one image, not 2"),
    ("neither", {"id": "x"}, "items[1].text", "text or an image"),
    ("no data", image(b""), "items[1].images[0].data", "no image of a format"),
    ("a document", image(b"%PDF-1.7"), "items[1].images[0].data", "no image of a format"),
    ("a drawing", image(b"<svg/>"), "items[1].images[0].data", "no image of a format"),
    ("other riff", image(b"RIFF\0\0\0\0WAVE"), "items[1].images[0].data", "no image of a format"),
    ("an unknown format", image(format="heic"), "items[1].images[0].format", "'heic' is not one of"),
    ("too large", image(PNG + b"\0" * MAX_IMAGE_BYTES), "items[1].images[0].data", "larger than"),
    ("audio", {"audio": {"data": b"x"}}, "items[1].audio", "not audio"),
]


@pytest.mark.parametrize(("item", "param", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_bad_image_is_refused_with_its_field(item: Any, param: str, words: str) -> None:
    error = refusal({"text": "a"}, item, image())
    assert (error.code, error.param) == ("INVALID_INPUT", param)
    assert words in error.message
    assert [one["index"] for one in error.details["items"]] == [1]


def test_every_bad_item_is_listed() -> None:
    error = refusal(image(b"?"), {"text": "a"}, image(format="pdf"))
    assert [(one["index"], one["param"]) for one in error.details["items"]] == [
        (0, "items[0].images[0].data"),
        (2, "items[2].images[0].format"),
    ]


def test_a_model_gets_what_it_takes_only() -> None:
    assert refusal(image(), model=spec("text")).param == "items[0].images"
    assert refusal({"text": "a"}, model=spec("image")).param == "items[0].text"
    assert admit(image(), model=spec("image")).items


def test_a_request_holds_a_bounded_number_of_images_and_items() -> None:
    assert len(admit(*[image()] * MAX_IMAGES, {"text": "a"}).items) == MAX_IMAGES + 1
    error = refusal(*[image()] * (MAX_IMAGES + 1))
    assert (error.param, str(MAX_IMAGES) in error.message) == ("items", True)
    assert refusal(image(), image(), model=spec("text", "image", max_items=1)).param == "items"


def test_images_weigh_by_patches_and_by_the_size_of_their_files() -> None:
    text, small = admitted({"text": "a" * 40}), admitted(image())
    large = admitted(image(PNG + b"\0" * 2**20))
    mixed = admitted({"text": "a" * 40}, image(), image())
    assert text.tokens < 16 < 200 < small.tokens < large.tokens
    assert mixed.tokens == text.tokens + 2 * small.tokens
    assert (text.images, small.images, mixed.images) == (0, 1, 2)


@pytest.mark.parametrize("name", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_formats_are_told_by_their_bytes(name: str) -> None:
    assert sniff(pictures.files()[name]) == name
    assert sniff(pictures.files()[name][1:]) is None
