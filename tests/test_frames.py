"""Pictures are looked at once and again when their file has changed, whatever became of the ledger."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from dkd_trainer.data import frames, ledger
from dkd_trainer.data.ledger import Ledger
from dkd_trainer.data.source import Pair


@pytest.fixture
def pairs(tmp_path):
    for number in range(3):
        Image.new("RGB", (40 + number, 24), "red").save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    return [Pair(tmp_path / f"{number}.png", "a cat", f"{number}.png") for number in range(3)]


def look(pairs, path):
    book = Ledger(path)
    with ThreadPoolExecutor(2) as pool:
        found = frames.look_at_all(pairs, book, pool)
    book.close()
    return found


def refuse(pair):
    raise AssertionError(f"{pair.name} was read again")


def test_size_hash_and_fault_of_a_picture_are_found(pairs, tmp_path):
    first, second, third = look(pairs, tmp_path / "looks.sqlite")
    assert (first.width, first.height, third.width) == (40, 24, 42)
    assert second.reason == "not a picture" and second.digest
    assert len({first.digest, second.digest, third.digest}) == 3


def test_an_unchanged_file_is_not_read_again(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "YOUNG", 0)
    before = look(pairs, tmp_path / "looks.sqlite")
    monkeypatch.setattr(frames, "look_at", refuse)
    assert look(pairs, tmp_path / "looks.sqlite") == before
    status = pairs[2].picture.stat()
    Image.new("RGB", (42, 24), "tan").save(pairs[2].picture)
    os.utime(pairs[2].picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(AssertionError, match="2.png was read again"):
        look(pairs, tmp_path / "looks.sqlite")


def test_a_file_too_young_to_be_told_by_its_time_is_read_again(pairs, tmp_path):
    before = look(pairs, tmp_path / "looks.sqlite")
    data = pairs[0].picture.read_bytes()
    pairs[0].picture.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert look(pairs, tmp_path / "looks.sqlite")[0].digest != before[0].digest


def test_a_missing_picture_is_looked_for_again(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "YOUNG", 0)
    away = tmp_path / "away"
    pairs[0].picture.rename(away)
    assert look(pairs, tmp_path / "looks.sqlite")[0].reason == "missing"
    away.rename(pairs[0].picture)
    assert look(pairs, tmp_path / "looks.sqlite")[0].width == 40


def test_parts_of_one_shard_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "YOUNG", 0)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, file in enumerate(files):
        Image.new("RGB", (50 + number, 30)).save(file)
    first, second = (file.read_bytes() for file in files)
    (tmp_path / "shard").write_bytes(first + second)
    places = [(0, len(first)), (len(first), len(second))]
    pairs = [Pair(tmp_path / "shard", "a cat", f"{start}", start, length) for start, length in places]
    for _ in range(2):
        assert [found.width for found in look(pairs, tmp_path / "looks.sqlite")] == [50, 51]


@pytest.mark.parametrize("content", [b"no database " * 100, None], ids=["damaged", "a folder"])
def test_without_a_ledger_every_picture_is_looked_at(pairs, tmp_path, content):
    path = tmp_path / "looks.sqlite"
    path.write_bytes(content) if content else path.mkdir()
    assert [found.width for found in look(pairs, path)] == [40, 0, 42]


def test_results_come_in_order_and_not_far_ahead():
    started = []
    with ThreadPoolExecutor(4) as pool:
        results = frames.map_ahead(pool, lambda n: started.append(n) or n, range(100), 5)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        assert len(started) <= 3 + 5
        assert list(results) == list(range(3, 100))
