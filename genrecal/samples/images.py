"""Encoded pictures -> pixels, within bounds."""

import functools
import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genrecal.errors import SampleError

# What is decoded, by Pillow's names: other formats come with programs (EPS runs Ghostscript), or hold many pictures.
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")


def open_image(data: bytes) -> Image.Image:
    """A picture whose pixels are not decoded yet. Raises one of Pillow's many errors."""
    return Image.open(io.BytesIO(data), formats=_known_formats())


@functools.lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    Image.init()  # not every Pillow has AVIF
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = 178_956_970) -> Image.Image:
    """Encoded bytes -> RGB picture, turned as its EXIF orientation says (both sides must see the same picture).

    Of an animation the first frame, of a multi-page file the first page; transparency is dropped, not blended.
    Raises SampleError for bytes that are no image of IMAGE_FORMATS, or one of more than `max_pixels` (Pillow's own bomb
    limit).
    """
    try:
        image = open_image(data)
        if image.width * image.height > max_pixels:
            raise SampleError(
                f"image of {image.width} x {image.height} pixels is over the limit of {max_pixels} pixels"
            )
        upright = _upright(image)
        if upright.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion makes all but the darkest white
            upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
        return upright.convert("RGB")
    except SampleError:
        raise
    except UnidentifiedImageError:  # its own words hold a memory address, and a reason must be the same in every run
        formats = ", ".join(IMAGE_FORMATS)
        raise SampleError(f"image cannot be decoded: of no format that is read here ({formats})") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        reason = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split())) or type(error).__name__
        raise SampleError(f"image cannot be decoded: {reason}") from None


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; as it is where they cannot be read, as every viewer shows it."""
    image.load()  # damaged pixels are no matter of the EXIF data
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image
