"""Images of a request: bytes in, plain RGB pictures out, under limits. No torch.

What comes in is hostile: every size is checked before a decoder runs, and whatever a decoder raises is the error of
that one image. An animation gives its first frame, a photograph is turned as its camera held it, transparency is left
out (as the image processors of transformers do), and numbers of 16 bits become 8.
"""

import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import Any, Final

from PIL import Image, ImageOps, UnidentifiedImageError

from common.errors import RequestError

FORMATS: Final = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
"""Only these decoders of Pillow ever see a request's bytes."""
MAX_PIXELS: Final = 50_000_000
"""Decoded, an image takes three to four bytes a pixel, and a copy or two while it is made smaller."""
MAX_RATIO: Final = 100
"""Processors scale the short side first: a line of one pixel would become a picture of billions."""
_SIXTEEN_BIT: Final = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_WIDE: Final = frozenset({"I", "F"})

# Damaged files make Pillow warn in words of their own, each of which Python would print, and remember for ever.
warnings.filterwarnings("ignore", module=r"PIL\.")


def image_of(item: Any, place: int) -> Image.Image | None:
    """The picture of an item, which stands at ``place`` of its request; None if it has none.

    Raises:
        RequestError: it has several, or something that is none of ``FORMATS`` or cannot be decoded.
    """
    images = item.get("images") if isinstance(item, Mapping) else None
    if not images:
        return None
    where = f"items[{place}].images"
    if not isinstance(images, list) or not isinstance(images[0], Mapping):
        raise RequestError("images is a list of maps with data and format", param=where)
    if len(images) > 1:
        raise RequestError(f"an item holds one image, not {len(images)}: send each as an item of its own", param=where)
    data, where = images[0].get("data"), f"{where}[0].data"
    if not isinstance(data, bytes):
        raise RequestError("an image's data is bytes", param=where)
    return decode(data, param=where)


def decode(data: bytes, *, param: str) -> Image.Image:
    """The bytes of one image file as an RGB picture.

    Raises:
        RequestError: too large, too narrow, damaged, or no image of ``FORMATS``.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_size(image, param)
            _check_numbers(image, param)
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except (RequestError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise RequestError(f"the data is no image that can be read: give {_formats()}", param=param) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"the image has more than the {MAX_PIXELS} pixels that are read", param=param) from error
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise RequestError(f"the image is damaged: {str(error)[:200] or type(error).__name__}", param=param) from error


def _check_size(image: Image.Image, param: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        message = f"the image has {width} x {height} pixels, more than the {MAX_PIXELS} that are read: send it smaller"
        raise RequestError(message, param=param)
    if max(width, height) > MAX_RATIO * min(width, height):
        message = f"the image has {width} x {height} pixels: one side is more than {MAX_RATIO} times the other"
        raise RequestError(message, param=param)


def _check_numbers(image: Image.Image, param: str) -> None:
    if image.mode in _WIDE:
        raise RequestError("the image has numbers of 32 bits a pixel: send it in 8 or 16", param=param)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        image = image.point(lambda value: value / 257, "L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # else Pillow warns that it leaves the transparency out
    return image if image.mode == "RGB" else image.convert("RGB")


def _formats() -> str:
    return ", ".join(name.lower() for name in FORMATS)
