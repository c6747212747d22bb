"""WebDataset shards are read where they lie; what is hostile, damaged or without a prompt is listed."""

import io
import json
import tarfile

import pytest

from dkd_trainer.data.pairs import list_source
from dkd_trainer.data.shards import expand_braces, find_shards
from dkd_trainer.data.source import DataError, count_reasons


def write_shard(path, members, mode="w"):
    """A tar of (name, bytes) members, or of ready TarInfo objects."""
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def list_pairs(source):
    return [(pair.name, pair.prompt, pair.read_bytes()) for pair in list_source(source).pairs]


def test_pictures_and_prompts_are_found_by_name_in_any_order(tmp_path):
    write_shard(
        tmp_path / "00000.tar",
        [
            ("000.jpg", b"first"),
            ("000.txt", b"  a cat\n"),
            ("001.txt", "\ufeffcaf\xe9".encode()),
            ("001.WEBP", b"second"),
            ("sub.dir/000.png", b"third"),
            ("sub.dir/000.json", json.dumps({"caption": "a dog", "width": 3}).encode()),
            ("002.jpg", b"fourth"),
            ("002.json", b'{"caption": "ignored"}'),
            ("002.txt", b"from the text"),
            ("002.cls", b"7"),
        ],
    )
    assert list_pairs(tmp_path / "00000.tar") == [
        ("00000.tar/000", "a cat", b"first"),
        ("00000.tar/001", "caf\xe9", b"second"),
        ("00000.tar/sub.dir/000", "a dog", b"third"),
        ("00000.tar/002", "from the text", b"fourth"),
    ]


def test_shards_are_named_by_folder_braces_or_wildcards_in_order(tmp_path):
    for n in (0, 1, 2, 10):
        write_shard(tmp_path / f"{n:05d}.tar", [("a.jpg", b"x"), ("a.txt", f"{n}".encode())])
    for source in (tmp_path, f"{tmp_path}/{{00000..00010}}.tar", f"{tmp_path}/*.tar"):
        assert [pair.prompt for pair in list_source(source).pairs] == ["0", "1", "2", "10"]
    assert [pair.prompt for pair in list_source(f"{tmp_path}/{{00002,00000}}.tar").pairs] == ["2", "0"]
    assert count_reasons(list_source(f"{tmp_path}/{{00000..00010}}.tar").skipped) == "7 missing"
    assert len(list_source(tmp_path, limit=2).pairs) == 2


def test_braces_are_expanded_as_a_shell_does():
    assert list(expand_braces("a{8..10}b{x,y}")) == ["a8bx", "a8by", "a9bx", "a9by", "a10bx", "a10by"]
    assert list(expand_braces("{008..010}")) == ["008", "009", "010"]
    assert list(expand_braces("plain{}")) == ["plain{}"]
    with pytest.raises(DataError, match="more than 100000 files"):
        list(expand_braces("{0..999999999}{0..999999999}"))


def test_samples_without_a_prompt_or_a_picture_are_listed(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        [
            ("good.jpg", b"x"),
            ("good.txt", b"fine"),
            ("alone.jpg", b"x"),
            ("failed.json", b'{"caption": "no download"}'),
            ("empty.jpg", b"x"),
            ("empty.txt", b" \n"),
            ("latin.jpg", b"x"),
            ("latin.txt", b"caf\xe9"),
            ("null.jpg", b"x"),
            ("null.json", b'{"caption": null}'),
            ("deep.jpg", b"x"),
            ("deep.json", b"[" * 200_000),
            ("list.jpg", b"x"),
            ("list.json", b"[1]"),
            ("long.jpg", b"x"),
            ("long.txt", b"a" * 70_000),
        ],
    )
    listing = list_source(tmp_path / "a.tar")
    assert [pair.name for pair in listing.pairs] == ["a.tar/good"]
    assert {skip.name.removeprefix("a.tar/"): skip.reason for skip in listing.skipped} == {
        "alone": "no prompt",
        "failed": "no picture",
        "empty": "empty prompt",
        "latin": "prompt is not readable text",
        "null": "no prompt",
        "deep": "prompt is not readable text",
        "list": "prompt is not readable text",
        "long": "prompt is not readable text",
    }


def make_member(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_hostile_members_are_refused_and_nothing_is_unpacked(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    hostile = [
        ("../escape.jpg", b"x"),
        ("/etc/absolute.jpg", b"x"),
        ("a/../../up.txt", b"x"),
        make_member("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        make_member("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        make_member("device.jpg", tarfile.CHRTYPE),
        make_member("pipe.jpg", tarfile.FIFOTYPE),
    ]
    path = write_shard(folder / "a.tar", [("good.jpg", b"x"), ("good.txt", b"fine"), *hostile])
    listing = list_source(path)
    assert [pair.name for pair in listing.pairs] == ["a.tar/good"]
    assert count_reasons(listing.skipped) == "7 refused member"
    assert "'../escape.jpg'" in str(listing.skipped[0])
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "a.tar"]


def test_a_picture_said_to_be_huge_is_refused(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("good.jpg", b"x"), ("good.txt", b"fine")])
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 2**40
    body = path.read_bytes().rstrip(b"\0")
    path.write_bytes(body + b"\0" * (-len(body) % 512) + huge.tobuf())
    listing = list_source(path)
    assert [pair.name for pair in listing.pairs] == ["a.tar/good"]
    assert [skip.reason for skip in listing.skipped] == ["refused member", "cut off"]


@pytest.mark.parametrize("cut", [512 * 4 + 100, 512 * 6 + 300])
def test_a_cut_shard_gives_what_came_before(tmp_path, cut):
    members = [("a.jpg", b"x" * 600), ("a.txt", b"fine"), ("b.jpg", b"y" * 600), ("b.txt", b"lost")]
    path = write_shard(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: cut + 512])
    listing = list_source(path)
    assert [pair.name for pair in listing.pairs] == ["a.tar/a"]
    assert "cut off" in [skip.reason for skip in listing.skipped]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", b"fine"), ("b.jpg", b"y"), ("b.txt", b"lost")])
    data = bytearray(path.read_bytes())
    data[4 * 512 : 4 * 512 + 200] = b"\xff" * 200
    path.write_bytes(data)
    listing = list_source(path)
    assert [pair.name for pair in listing.pairs] == ["a.tar/a"]
    assert [str(skip) for skip in listing.skipped] == ["a.tar: cut off (damaged after 2048 bytes)"]


def test_what_is_no_tar_is_listed(tmp_path):
    write_shard(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", b"fine")])
    (tmp_path / "b.tar").write_bytes(b"<html>" * 200)
    (tmp_path / "c.tar").write_bytes(b"")
    listing = list_source(tmp_path)
    assert len(listing.pairs) == 1
    assert [(skip.name, skip.reason) for skip in listing.skipped] == [("b.tar", "cut off"), ("c.tar", "cut off")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("https://host/00000.tar", "download"),
        ("pipe:cat 00000.tar", "download"),
        ("{0..3}.tar.gz", "unpacked to .tar"),
        ("nowhere-{0..3}.tar", "no shard matches"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        find_shards(pattern)
