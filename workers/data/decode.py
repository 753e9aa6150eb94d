"""Pictures decoded: upright, in RGB, or refused with the place where they stand."""

from io import BytesIO
from typing import TYPE_CHECKING, Final

from sweep.core.errors import SweepError
from workers.data.conversations import PictureSource

if TYPE_CHECKING:
    from PIL.Image import Image

# Pixels of the largest picture that is decoded: where Pillow warns of a decompression bomb (Image.MAX_IMAGE_PIXELS,
# 1 GB as RGB with alpha at four bytes a channel). A file of a few KB can claim more.
MAX_PIXELS: Final = 89_478_485
_DEEP: Final = ("I", "F")  # Pillow's modes of 32 bits


def decoded(source: PictureSource) -> "Image":
    """The picture as processors take it: RGB, turned as its EXIF says, on white where it is transparent.

    Raises: SweepError: it is missing, no picture, broken, larger than MAX_PIXELS, or of more than 8 bits a value, which
        Pillow would cut off at 255; names its place in the data.

    Source: transformers' load_image turns pictures and converts them to RGB; vLLM puts them on white (rgba_to_rgb of
        vllm/multimodal/image.py), and what it serves is what is to be measured.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = "The picture" if source.path is None else f"The picture {source.path}"
    try:
        with Image.open(source.path or BytesIO(source.content or b"")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise SweepError(
                    f"{name} ({source.origin}) has {picture.width} x {picture.height} pixels; up to {MAX_PIXELS:,} are "
                    "decoded, as a larger one may be a decompression bomb. Scale it down, or take it out."
                )
            if picture.mode in _DEEP or picture.mode.startswith("I;16"):
                raise SweepError(
                    f"{name} ({source.origin}) has more than 8 bits a value (mode {picture.mode} of Pillow), and would "
                    "be nearly white in RGB. Save it with 8 bits a value, or take it out."
                )
            upright = ImageOps.exif_transpose(picture)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            on_top = upright.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", on_top.size, "white"), on_top).convert("RGB")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise SweepError(
            f"{name} ({source.origin}) cannot be read: {error.strerror}. "
            "Paths of pictures start at the directory of the data file: put it there, or correct the path."
        ) from error
    except UnidentifiedImageError as error:
        raise SweepError(
            f"{name} ({source.origin}) is no picture that Pillow knows. Give a JPEG, PNG, WebP, GIF, BMP or TIFF file."
        ) from error
    except Image.DecompressionBombError as error:
        raise SweepError(
            f"{name} ({source.origin}) is too large: {error} Scale it down to {MAX_PIXELS:,} pixels, or take it out."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's readers raise of a file cut short
        raise SweepError(f"{name} ({source.origin}) is broken: {error}. Copy it again, or take it out.") from error
