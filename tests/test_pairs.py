"""Training pairs: both layouts are read, what cannot be used is skipped by name, an empty folder is an error."""

import pytest
import torch
from PIL import Image

from dkd_trainer.pairs import DataError, find_pairs, read_picture


def write_pair(folder, name, prompt="a cat", images="", prompts=""):
    for part in (images, prompts):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 24), "red").save(folder / images / f"{name}.png")
    if prompt is not None:
        (folder / prompts / f"{name}.txt").write_bytes(prompt if isinstance(prompt, bytes) else prompt.encode())


@pytest.mark.parametrize("layout", [{}, {"images": "image", "prompts": "prompt"}], ids=["side by side", "two folders"])
def test_both_layouts_are_read_and_bad_pairs_are_listed(tmp_path, layout):
    write_pair(tmp_path, "good", "  a red apple\n", **layout)
    write_pair(tmp_path, "empty", " \n", **layout)
    write_pair(tmp_path, "missing", None, **layout)
    write_pair(tmp_path, "latin", "caf\xe9".encode("latin-1"), **layout)
    pairs, skipped = find_pairs(tmp_path)
    assert [(p.picture.name, p.prompt) for p in pairs] == [("good.png", "a red apple")]
    assert sorted(line.split(":")[0] for line in skipped) == ["empty.png", "latin.png", "missing.png"]


def test_a_folder_without_pairs_is_an_error_that_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match="expected image/NAME.jpg with prompt/NAME.txt"):
        find_pairs(tmp_path)
    with pytest.raises(DataError):
        find_pairs(tmp_path / "nowhere")


def test_pictures_are_cut_to_the_middle_square(tmp_path):
    picture = Image.new("RGB", (48, 16), "black")
    picture.paste("white", (16, 0, 32, 16))
    picture.save(tmp_path / "wide.png")
    tensor = read_picture(tmp_path / "wide.png", 16)
    assert tensor.shape == (3, 16, 16)
    assert torch.all(tensor == 1)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(DataError, match="broken.png"):
        read_picture(tmp_path / "broken.png", 16)
