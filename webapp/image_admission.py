"""Images of a request, before anything is published: how many, how large, and of a format that is read.

Only the first bytes are looked at, without an image library: whether a file can be decoded shows on the host. Images
that are named by their address are fetched before, where that is allowed.
"""

from time import monotonic
from typing import Final

import msgspec

from common.errors import RequestError
from webapp.fetching import TIMEOUT_S, Fetcher
from webapp.wire.bodies import ImageFile, Item

FORMATS: Final = ("jpeg", "png", "gif", "webp", "bmp", "tiff")
MAX_IMAGE_BYTES: Final = 16 * 2**20
MAX_IMAGES: Final = 256
"""Of one request."""
MAX_FETCHED: Final = 16
"""Addresses in one request."""
_OTHER_NAMES: Final = {"jpg": "jpeg", "tif": "tiff"}
_STARTS: Final = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)
_TOKENS: Final = 256
"""Patches of an image of 224 to 256 pixels a side, cut at 14 to 16 pixels."""
_BYTES_A_TOKEN: Final = 4096
"""Decoding takes time by the size of the file."""


class ImageItem(msgspec.Struct, omit_defaults=True):
    """An item with an image as a model's host reads it; ``format`` is what the bytes are, whatever their name."""

    images: list[ImageFile]
    id: str | None = None


def image_item(item: Item) -> ImageItem:
    """An item whose images ``wrong_with_images`` has found right."""
    return ImageItem([ImageFile(one.data, sniff(one.data)) for one in item.images or []], item.id)


def wrong_with_images(item: Item) -> tuple[str, str] | None:
    """What is wrong with the images of one item, and with which field of it."""
    images = item.images or []
    if item.text is not None:
        return "an item is a text or an image, not both: send each as an item of its own", "images"
    if len(images) > 1:
        return f"an item holds one image, not {len(images)}: send each as an item of its own", "images"
    for at, image in enumerate(images):
        if not _is_known(image.format):
            return f"format {str(image.format)[:100]!r} is not one of {', '.join(FORMATS)}", f"images[{at}].format"
        if (size := len(image.data)) > MAX_IMAGE_BYTES:
            message = f"an image of {size} bytes is larger than the {MAX_IMAGE_BYTES} bytes that one may have"
            return message, f"images[{at}].data"
        if sniff(image.data) is None:
            return f"the data is no image of a format that is read: give {', '.join(FORMATS)}", f"images[{at}].data"
    return None


def fetch_images(items: list[Item], *, is_allowed: bool) -> None:
    """Give the images that are named by their address their bytes.

    Raises:
        RequestError: this farm fetches none, or an address cannot be fetched; ``param`` names it.
    """
    named = [
        (f"items[{at}].images[{place}].url", image, image.url)
        for at, item in enumerate(items)
        for place, image in enumerate(item.images or ())
        if image.url is not None
    ]
    fetcher = Fetcher(deadline=monotonic() + TIMEOUT_S)
    for param, image, url in named:
        if not is_allowed:
            raise RequestError("this farm fetches no images: send their bytes as data", param=param)
        if len(named) > MAX_FETCHED:
            raise RequestError(f"{len(named)} addresses are more than the {MAX_FETCHED} of one request", param=param)
        if image.data:
            raise RequestError("an image has data or an address, not both", param=param)
        image.data = fetcher.fetch(url, max_bytes=MAX_IMAGE_BYTES, param=param)


def sniff(data: bytes) -> str | None:
    """The format of an image file by its first bytes; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for start, name in _STARTS if data.startswith(start)), None)


def estimate_image_tokens(item: ImageItem) -> int:
    """A guess at what an image costs its host, in tokens of a text."""
    return sum(_TOKENS + len(one.data) // _BYTES_A_TOKEN for one in item.images)


def _is_known(name: str | None) -> bool:
    if name is None:
        return True
    plain = name.lower().removeprefix("image/")
    return _OTHER_NAMES.get(plain, plain) in FORMATS
