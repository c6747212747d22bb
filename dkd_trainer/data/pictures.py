"""Picture files of any kind as upright RGB of a bucket's shape."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from .source import BOMB, BROKEN, NOT_A_PICTURE, DataError, Refused

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's other readers are less guarded, and one starts Ghostscript
MOST_PIXELS = 100_000_000
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(data: bytes) -> tuple[Image.Image, int]:
    """A picture of which only the header was read, and its EXIF orientation; raises Refused."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise Refused(BOMB, str(error)) from error
    except UnidentifiedImageError as error:
        raise Refused(NOT_A_PICTURE, f"expected {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise half a dozen kinds for a hostile header
        raise Refused(BROKEN, f"{type(error).__name__}: {error}") from error
    if picture.width * picture.height > MOST_PIXELS:
        raise Refused(BOMB, f"{picture.width}x{picture.height}, expected at most {MOST_PIXELS // 10**6} million")
    return picture, read_orientation(picture)


def read_orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    if picture.format == "PNG" and "exif" not in picture.info:
        return 1  # asking a PNG for it would decode the picture
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF does not make a picture unusable
        return 1


def measure_picture(data: bytes) -> tuple[int, int]:
    """Upright (width, height) in pixels, from the header alone; raises Refused."""
    picture, orientation = open_picture(data)
    return picture.size[::-1] if orientation >= 5 else picture.size


def decode_picture(data: bytes) -> Image.Image:
    """A whole picture, upright, in RGB; raises Refused for a broken one."""
    picture, orientation = open_picture(data)
    try:
        rgb = to_rgb(picture)
    except Exception as error:  # Pillow's decoders raise half a dozen kinds for damaged data
        raise Refused(BROKEN, str(error) or type(error).__name__) from error
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey is scaled, transparency is laid on white, CMYK goes through its own colour profile."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    if picture.mode == "CMYK" and (profile := picture.info.get("icc_profile")):
        return convert_colours(picture, profile)
    return picture.convert("RGB")


def convert_colours(picture: Image.Image, profile: bytes) -> Image.Image:
    """CMYK to sRGB through the picture's profile, or without it where the profile is damaged."""
    picture.load()
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        converted = None
    return converted or picture.convert("RGB")


def cut_picture(picture: Image.Image, width: int, height: int) -> Tensor:
    """The middle of a picture, scaled to cover (3, height, width), in [0, 1]."""
    scale = max(width / picture.width, height / picture.height)
    across, down = width / scale, height / scale
    left, top = (picture.width - across) / 2, (picture.height - down) / 2
    box = (max(0.0, left), max(0.0, top), min(picture.width, left + across), min(picture.height, top + down))
    cut = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255


def read_picture(path: Path, size: int) -> Tensor:
    """A picture file (3, size, size) in [0, 1], cut to the middle square; raises DataError for a broken file."""
    try:
        return cut_picture(decode_picture(path.read_bytes()), size, size)
    except (OSError, Refused) as error:
        raise DataError(f"{path.name} cannot be read as a picture: {error}") from error
