"""Image files for tests, made in memory: small pictures of noise and shapes, in every format and mode that is read."""

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def picture(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    """A smooth gradient with some noise on it: neither flat nor unlike a photograph."""
    noise = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    bands = [noise.uniform() * across + noise.uniform() * down + 0.2 * noise.random((height, width)) for _ in range(3)]
    return Image.fromarray((np.stack(bands, axis=-1) * 110).astype(np.uint8))


def noise(width: int, height: int) -> Image.Image:
    """What no format makes smaller."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    """A JPEG whose EXIF says how its camera was held."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, "JPEG", quality=95, exif=exif)


def animation(*frames: Image.Image) -> bytes:
    """An animated GIF."""
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


def files() -> dict[str, bytes]:
    """One file of each kind that is read, by name."""
    plain = picture()
    alpha = plain.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(plain.size))
    palette = plain.quantize(16)
    palette.info["transparency"] = 3
    return {
        "png": saved(plain),
        "jpeg": saved(plain, "JPEG", quality=95),
        "gif": saved(plain.quantize(64), "GIF"),
        "webp": saved(plain, "WEBP", lossless=True),
        "bmp": saved(plain, "BMP"),
        "tiff": saved(plain, "TIFF"),
        "square": saved(picture(32, 32, seed=1)),
        "wide": saved(picture(300, 40, seed=2)),
        "tall": saved(picture(17, 111, seed=3)),
        "dot": saved(picture(1, 1, seed=4)),
        "three rows": saved(picture(50, 3, seed=5)),
        "grey": saved(plain.convert("L")),
        "bits": saved(plain.convert("1")),
        "alpha": saved(alpha),
        "palette": saved(palette, transparency=3),
        "cmyk": saved(plain.convert("CMYK"), "JPEG", quality=95),
        "turned": turned(picture(40, 20, seed=6), 6),
        "mirrored": turned(picture(40, 20, seed=7), 2),
        "animation": animation(picture(seed=8).quantize(64), picture(seed=9).quantize(64)),
    }
