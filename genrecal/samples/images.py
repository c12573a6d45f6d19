"""Encoded images -> pixels, within bounds."""

import functools
import io
import re

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from genrecal.errors import SampleError

# What is decoded, by Pillow's names: other formats come with programs (EPS runs Ghostscript).
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
ONE_IMAGE_FORMATS = ("ICO", "MPO")  # what else they hold are other sizes, or a phone's preview, of the same image
CHANNEL_COUNTS = (1, 3)  # transformers takes an array whose first axis is so long for one with the channels first
BACKGROUND = "white"  # of transparent images, as Qwen's own code and vLLM have it; recorded in cache.json


def open_image(data: bytes) -> Image.Image:
    """An image whose pixels are not decoded yet. Raises one of Pillow's many errors."""
    return Image.open(io.BytesIO(data), formats=_known_formats())


@functools.lru_cache(maxsize=1)
def _known_formats() -> tuple[str, ...]:
    Image.init()  # not every Pillow has AVIF
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def decode_image(data: bytes, max_pixels: int = 178_956_970) -> Image.Image:
    """Encoded bytes -> RGB image, turned as its EXIF orientation says (both sides must see the same image).

    Transparent images are put on BACKGROUND. 16 bits become their upper 8. Colour profiles are not applied.

    Raises SampleError for bytes that are no image of IMAGE_FORMATS, one of more than `max_pixels` (Pillow's own bomb limit),
    of 1 or 3 rows, and one of which content would be lost: several frames or pages, 32 bits a pixel, or no contrast with
    the background.
    """
    try:
        image = open_image(data)
        if image.width * image.height > max_pixels:
            raise SampleError(
                f"image of {image.width} x {image.height} pixels is over the limit of {max_pixels} pixels"
            )
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format not in ONE_IMAGE_FORMATS:
            raise SampleError(f"image has {frames} frames or pages; give each as an image of its own")
        upright = _upright(image)
        if upright.height in CHANNEL_COUNTS:
            raise SampleError(
                f"image of {upright.width} x {upright.height} pixels: image processors take {upright.height} rows for colour "
                "channels; enlarge it to 4 or more rows"
            )
        if upright.mode in ("I", "F"):
            raise SampleError("image of 32 bits a pixel, which does not say what is white; save it with 8 or 16")
        if upright.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion makes all but the darkest white
            rgb = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
        elif upright.has_transparency_data:
            visible = upright.convert("RGBA")
            rgb = Image.new("RGB", visible.size, BACKGROUND)
            rgb.paste(visible, mask=visible.getchannel("A"))
        else:
            return upright.convert("RGB")
        if _is_blank(rgb) and not _is_blank(upright):
            raise SampleError(
                "image has no contrast: transparent images are put on white, and of 16 bits the upper 8 are read"
            )
        return rgb
    except SampleError:
        raise
    except UnidentifiedImageError:  # its own words hold a memory address, and a reason must be the same in every run
        formats = ", ".join(IMAGE_FORMATS)
        raise SampleError(f"image cannot be decoded: of no format that is read here ({formats})") from None
    except Exception as error:  # Pillow raises many kinds for corrupt files
        reason = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split())) or type(error).__name__
        raise SampleError(f"image cannot be decoded: {reason}") from None


def _is_blank(image: Image.Image) -> bool:
    """Whether all pixels are the same."""
    bands = image.getextrema()
    return all(low == high for low, high in (bands if isinstance(bands[0], tuple) else (bands,)))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data say; unchanged if they cannot be read, as viewers show it."""
    image.load()  # raise for corrupt pixels here, not in the EXIF step
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image
