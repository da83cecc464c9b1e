"""Image files as a host reads them: what is too large, damaged, cut off or of other numbers than eight bits."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.errors import RequestError
from tests import pictures
from workers.host.images import MAX_PIXELS, decode

pytestmark = pytest.mark.filterwarnings("ignore:::PIL.*")  # as where it is served
FILES = pictures.files()


def refusal_of(data: bytes) -> str:
    with pytest.raises(RequestError) as refused:
        decode(data, param="items[0].images[0].data")
    assert refused.value.param == "items[0].images[0].data"
    return refused.value.message


@pytest.mark.parametrize("size", [(7100, 7100), (10_000, 10_000), (20_000, 20_000), (65_000, 65_000)])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "JPEG", "WEBP"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(kind: str, size: tuple[int, int]) -> None:
    """Some hundred bytes may stand for gigabytes; only the header is true here, so that decoding would show."""
    data = claiming(kind, *size) if kind != "WEBP" else claiming(kind, min(size[0], 16_383), min(size[1], 16_383))
    assert "pixels" in refusal_of(data)


def claiming(kind: str, width: int, height: int) -> bytes:
    """A small file whose header claims another size."""
    raw = bytearray(pictures.saved(pictures.picture(16, 16), kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "PNG":
        raw[16:24] = struct.pack(">II", width, height)
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    elif kind == "GIF":
        at = raw.index(b",")
        raw[6:10] = raw[at + 5 : at + 9] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        raw[18:26] = struct.pack("<ii", width, height)
    elif kind == "TIFF":
        for tag, value in ((256, width), (257, height)):
            at = raw.index(struct.pack("<HHI", tag, 4, 1)) if struct.pack("<HHI", tag, 4, 1) in raw else -1
            at = at if at >= 0 else raw.index(struct.pack("<HHI", tag, 3, 1))
            raw[at + 2 : at + 12] = struct.pack("<HII", 4, 1, value)
    elif kind == "JPEG":
        at = raw.index(b"\xff\xc0")
        raw[at + 5 : at + 9] = struct.pack(">HH", height, width)
    else:
        raw[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(raw)


def test_the_largest_image_is_read_and_a_line_is_not() -> None:
    side = int(MAX_PIXELS**0.5)
    assert decode(pictures.saved(Image.new("1", (side, side))), param="x").size == (side, side)
    assert "more than 100 times" in refusal_of(pictures.saved(Image.new("1", (10_000, 2))))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_an_image_cut_off_anywhere_is_an_error_and_never_half_a_picture(kind: str) -> None:
    whole = pictures.saved(pictures.picture(), kind)
    for length in range(0, len(whole) - 64, max(1, len(whole) // 40)):
        assert "image" in refusal_of(whole[:length])


def test_a_file_with_bytes_changed_is_read_or_refused_and_nothing_else_happens() -> None:
    chance = np.random.default_rng(0)
    refused = 0
    for name, whole in sorted(FILES.items()) * 30:
        data = bytearray(whole)
        for _ in range(chance.choice([1, 2, 20])):
            data[chance.integers(min(len(data), chance.choice([40, 200, 10_000])))] = chance.integers(256)
        try:
            assert decode(bytes(data), param="x").mode == "RGB", name
        except RequestError:
            refused += 1
    assert 100 < refused < 30 * len(FILES) - 100


def test_numbers_of_sixteen_bits_are_scaled_and_wider_ones_refused() -> None:
    deep = np.array([[0, 257 * 7, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        read = decode(pictures.saved(Image.fromarray(deep), kind), param="x")
        assert np.asarray(read)[0].tolist() == [[0] * 3, [7] * 3, [255] * 3]
    for mode in ("I", "F"):
        assert "32 bits" in refusal_of(pictures.saved(Image.new(mode, (4, 4)), "TIFF"))
