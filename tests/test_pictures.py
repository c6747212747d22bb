"""Pictures of every kind come out upright, in RGB and in their bucket's shape; the unusable ones say why they are."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dkd_trainer.data.buckets import Framing
from dkd_trainer.data.pictures import cut_picture, decode_picture, measure_picture, read_picture
from dkd_trainer.data.source import DataError, Refused


def save(picture, kind="PNG", **settings):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def mean_colour(data):
    return np.asarray(decode_picture(data), dtype=float).mean((0, 1)).round().tolist()


def paint_corner():
    """White, 8 wide and 4 high, with a red top left quarter."""
    picture = Image.new("RGB", (8, 4), "white")
    picture.paste("red", (0, 0, 4, 2))
    return picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_rotation_is_undone_before_cutting(orientation, kind):
    backwards = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = paint_corner().resize((64, 32), Image.Resampling.NEAREST)
    stored = upright.transpose(backwards[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(stored, kind, exif=exif)
    assert measure_picture(data) == (64, 32)
    error = np.abs(np.asarray(decode_picture(data), dtype=float) - np.asarray(upright, dtype=float))
    assert error.mean() < 3


def test_damaged_exif_does_not_spoil_a_picture():
    data = save(paint_corner(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff")
    assert measure_picture(data) == (8, 4)
    assert decode_picture(data).size == (8, 4)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert mean_colour(save(clear)) == [255, 255, 255]
    assert mean_colour(save(Image.new("LA", (4, 4), (0, 0)))) == [255, 255, 255]
    assert mean_colour(save(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), "WEBP", lossless=True)) == [255, 127, 127]


def test_palettes_are_looked_up_with_and_without_transparency():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert mean_colour(save(palette)) == [0, 0, 255]
    assert mean_colour(save(palette, transparency=1)) == [255, 255, 255]


def test_sixteen_bit_grey_keeps_its_brightness():
    values = np.full((4, 4), 128 * 257, np.uint16)
    assert mean_colour(save(Image.fromarray(values))) == [128, 128, 128]


def test_sixteen_bit_colour_keeps_its_brightness():
    row = b"\0" + struct.pack(">3H", 65535, 32768, 0) * 2
    assert mean_colour(write_png(2, 2, 16, zlib.compress(row * 2))) == [255, 128, 0]


def test_cmyk_becomes_rgb():
    red = mean_colour(save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red[0] > 240 and max(red[1:]) < 15


def test_a_damaged_colour_profile_does_not_spoil_a_picture():
    data = save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", icc_profile=b"nonsense" * 20)
    assert mean_colour(data)[0] > 240


def write_png(width, height, depth, pixels):
    """A PNG of RGB pixels whose header may lie about its size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
UNUSABLE = {
    "nothing": (b"", "not a picture"),
    "text": (b"<html>404</html>", "not a picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "gif": (save(paint_corner(), "GIF"), "not a picture"),
    "cut JPEG": (save(NOISE, "JPEG")[:-500], "broken picture"),
    "cut PNG": (save(NOISE)[:-500], "broken picture"),
    "cut WebP": (save(NOISE, "WEBP", lossless=True)[:-500], "broken picture"),
    "no pixels": (write_png(64, 64, 8, zlib.compress(b"")), "broken picture"),
    "bomb": (write_png(40_000, 40_000, 8, zlib.compress(b"\0" * 10_000)), "too many pixels"),
    "small bomb": (write_png(12_000, 12_000, 8, zlib.compress(b"\0" * 10_000)), "too many pixels"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_picture_says_what_is_wrong(name):
    data, reason = UNUSABLE[name]
    with pytest.raises(Refused) as refused:
        measure_picture(data)
        decode_picture(data)
    assert refused.value.reason == reason


def test_the_middle_is_cut_in_any_shape(tmp_path):
    picture = Image.new("RGB", (48, 16), "black")
    picture.paste("white", (16, 0, 32, 16))
    assert torch.all(cut_picture(picture, 16, 16) == 1)
    assert torch.all(cut_picture(picture, 8, 16) == 1)
    assert cut_picture(picture, 24, 8).shape == (3, 8, 24)
    assert torch.all(cut_picture(picture.transpose(Image.Transpose.ROTATE_90), 16, 16) == 1)
    picture.save(tmp_path / "wide.png")
    assert torch.equal(read_picture(tmp_path / "wide.png", 16), torch.ones(3, 16, 16))


def test_a_picture_of_the_right_shape_is_left_as_it_is():
    expected = torch.from_numpy(np.array(NOISE)).permute(2, 0, 1) / 255
    assert torch.equal(cut_picture(NOISE, 64, 64), expected)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(DataError, match="broken.png"):
        read_picture(tmp_path / "broken.png", 16)


def test_without_a_ratio_all_pictures_become_squares():
    framing = Framing(128)
    assert framing.shapes == [(128, 128)]
    assert framing.choose_shape(1000, 100) == (128, 128)


@pytest.mark.parametrize(("size", "step", "ratio"), [(512, 64, 2.0), (768, 64, 2.5), (128, 32, 2.0), (512, 8, 3.0)])
def test_buckets_keep_to_step_area_and_ratio(size, step, ratio):
    framing = Framing(size, step, ratio)
    assert len(framing.shapes) > 4
    for width, height in framing.shapes:
        assert (height, width) in framing.shapes
        assert width % step == height % step == 0
        assert max(width, height) <= ratio * min(width, height)
        assert abs(width * height / size**2 - 1) < 0.2


def test_a_picture_goes_to_the_bucket_of_the_nearest_ratio():
    framing = Framing(512, 64, 2.0)
    assert framing.choose_shape(4000, 3000) == (576, 448)
    assert framing.choose_shape(3000, 4000) == (448, 576)
    assert framing.choose_shape(1920, 1080) == (704, 384)
    assert framing.choose_shape(1001, 1000) == (512, 512)
    assert framing.choose_shape(9000, 1000) == (704, 384)


def test_tiny_pictures_are_refused_rather_than_blown_up():
    with pytest.raises(Refused, match="too small.*300x255 pixels, expected 256"):
        Framing(512).choose_shape(300, 255)
    assert Framing(512).choose_shape(300, 256) == (512, 512)
    assert Framing(512, min_side=10).choose_shape(300, 10) == (512, 512)


@pytest.mark.parametrize("settings", [(100,), (0,), (512, 60), (512, 64, 0.5), (512, 64, 9)])
def test_impossible_buckets_are_an_error(settings):
    with pytest.raises(DataError, match="expected"):
        Framing(*settings)
