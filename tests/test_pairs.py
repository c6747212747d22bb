"""Folders and lists of prompts: every layout is read, what cannot be used is listed, nothing usable is an error."""

import pytest
from PIL import Image

from dkd_trainer.data.pairs import list_source
from dkd_trainer.data.source import DataError, count_reasons


def write_pair(folder, name, prompt="a cat", images="", prompts=""):
    for part in (images, prompts):
        (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 24), "red").save(folder / images / f"{name}.png")
    if prompt is not None:
        (folder / prompts / f"{name}.txt").write_bytes(prompt if isinstance(prompt, bytes) else prompt.encode())


@pytest.mark.parametrize("layout", [{}, {"images": "image", "prompts": "prompt"}], ids=["side by side", "two folders"])
def test_both_layouts_are_read_and_bad_pairs_are_listed(tmp_path, layout):
    write_pair(tmp_path, "good", "  a red apple\n", **layout)
    write_pair(tmp_path, "deep/er/good", "a pear", **layout)
    write_pair(tmp_path, "empty", " \n", **layout)
    write_pair(tmp_path, "missing", None, **layout)
    write_pair(tmp_path, "latin", "caf\xe9".encode("latin-1"), **layout)
    listing = list_source(tmp_path)
    assert [(p.picture.name, p.prompt) for p in listing.pairs] == [("good.png", "a red apple"), ("good.png", "a pear")]
    assert sorted(skip.name for skip in listing.skipped) == ["empty.png", "latin.png", "missing.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_of_common_editors_are_read(tmp_path, encoding):
    write_pair(tmp_path, "a", "caf\xe9 \u732b".encode(encoding))
    assert list_source(tmp_path).pairs[0].prompt == "caf\xe9 \u732b"


@pytest.mark.parametrize("prompt", [b"\xef\xbb\xbf", b"a\0b", b"\xff\xfe\x00", b"a" * 70_000, b"caf\xe9"])
def test_what_is_no_prompt_is_skipped(tmp_path, prompt):
    write_pair(tmp_path, "a", prompt)
    write_pair(tmp_path, "b", "fine")
    listing = list_source(tmp_path)
    assert [pair.prompt for pair in listing.pairs] == ["fine"]
    assert listing.skipped[0].reason in ("empty prompt", "prompt is not readable text")


def test_what_was_skipped_is_counted_by_reason(tmp_path):
    write_pair(tmp_path, "good")
    for name in "abc":
        write_pair(tmp_path, name, None)
    write_pair(tmp_path, "d", "")
    assert count_reasons(list_source(tmp_path).skipped) == "3 no prompt, 1 empty prompt"


def test_hidden_files_and_other_suffixes_are_no_pictures(tmp_path):
    write_pair(tmp_path, "good")
    write_pair(tmp_path, "._good")
    (tmp_path / "notes.md").write_text("hello")
    assert len(list_source(tmp_path).pairs) == 1


def test_a_folder_without_pairs_is_an_error_that_says_what_is_expected(tmp_path):
    (tmp_path / "film.gif").write_bytes(b"x")
    with pytest.raises(DataError, match=r"expected image/NAME.jpg with prompt/NAME.txt.*other files there: 1 .gif"):
        list_source(tmp_path)
    with pytest.raises(DataError, match="does not exist; expected a folder"):
        list_source(tmp_path / "nowhere")
    write_pair(tmp_path, "a", None)
    with pytest.raises(DataError, match="1 no prompt skipped"):
        list_source(tmp_path)


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dog \ncaf".encode() + b"\xe9\n" + "\u732b".encode())
    listing = list_source(path)
    assert [pair.prompt for pair in listing.pairs] == ["a cat", "a dog", "\u732b"]
    assert [(skip.name, skip.reason) for skip in listing.skipped] == [
        ("line 2", "empty prompt"),
        ("line 4", "prompt is not readable text"),
    ]
    path.write_bytes("a cat\na dog\n".encode("utf-16"))
    assert [pair.prompt for pair in list_source(path).pairs] == ["a cat", "a dog"]
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match="2 empty prompt skipped.*one prompt a line"):
        list_source(path)
