"""The cache: rows are found by key, whatever happened to a process that wrote them."""

import errno
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch

from dkd_trainer.data.cache import Reader, Store, hold, make_key
from dkd_trainer.data.source import DataError, Refused

WIDTH = 3


def number_items(count, start=0):
    return {make_key("item", n): n for n in range(start, start + count)}


def write_numbers(items):
    """The row of item n is n; multiples of 7 are refused."""
    return (Refused("odd", f"{n}") if n % 7 == 6 else torch.full((WIDTH,), float(n)) for n in items)


def fill(store, items, encode=write_numbers):
    store.fill(items, encode, WIDTH * 2)


def read_numbers(store, items):
    places = [store.find(key) for key in items]
    return Reader(store.files).read(place for place in places if isinstance(place, tuple))[:, 0].tolist()


def fail(items):
    raise AssertionError(f"{items} were encoded again")


def test_rows_are_read_in_the_order_asked_for(tmp_path):
    items = number_items(20)
    fill(Store(tmp_path, rows=4), items)
    store = Store(tmp_path, rows=4)
    keys = list(items)
    reader = pickle.loads(pickle.dumps(Reader(store.files)))
    rows = reader.read([store.find(keys[n]) for n in (19, 3, 3, 8)])
    assert rows.dtype == torch.float32 and rows[:, 0].tolist() == [19, 3, 3, 8]
    rows.zero_()
    assert reader.read([store.find(keys[3])])[0, 0] == 3


def test_a_shard_that_is_gone_or_cut_is_named(tmp_path):
    store = Store(tmp_path)
    fill(store, number_items(5))
    reader, path = Reader(store.files), store.files[0]
    path.write_bytes(path.read_bytes()[: -5 * 16 - 1])  # the keys come last
    assert reader.read([(0, 3)])[0, 0] == 3
    with pytest.raises(DataError, match=f"{path.name} cannot be read any more.*start again"):
        reader.read([(0, 4)])
    path.unlink()
    with pytest.raises(DataError, match="start again"):
        Reader(store.files).read([(0, 0)])


def test_what_is_there_is_not_made_again_nor_what_was_refused(tmp_path):
    fill(Store(tmp_path, rows=4), number_items(20))
    store = Store(tmp_path, rows=4)
    fill(store, number_items(20), fail)
    assert str(store.find(make_key("item", 6))) == "odd (6)"
    assert store.made == 0


def test_only_what_is_missing_is_made(tmp_path):
    fill(Store(tmp_path, rows=4), number_items(10))
    asked = []
    store = Store(tmp_path, rows=4)
    fill(store, number_items(6, start=7), lambda items: (asked.append(n) or torch.zeros(WIDTH) for n in items))
    assert asked == [10, 11, 12]


def test_what_could_not_be_read_is_tried_again(tmp_path):
    store = Store(tmp_path, rows=4)
    fill(store, number_items(4), lambda items: (None if n == 2 else torch.zeros(WIDTH) for n in items))
    assert store.find(make_key("item", 2)) is None
    fill(store, number_items(4))
    assert isinstance(store.find(make_key("item", 2)), tuple)


def test_a_stop_within_a_shard_loses_that_shard_alone(tmp_path):
    def stop(items):
        for n in items:
            if n == 9:
                raise KeyboardInterrupt
            yield torch.full((WIDTH,), float(n))

    with pytest.raises(KeyboardInterrupt):
        fill(Store(tmp_path, rows=4), number_items(20), stop)
    assert sum(isinstance(Store(tmp_path).find(key), tuple) for key in number_items(20)) == 8
    whole, resumed = Store(tmp_path / "whole", rows=4), Store(tmp_path, rows=4)
    fill(whole, number_items(20), lambda items: (torch.full((WIDTH,), float(n)) for n in items))
    fill(resumed, number_items(20), lambda items: (torch.full((WIDTH,), float(n)) for n in items))
    assert {path.name: path.read_bytes() for path in whole.files} == {p.name: p.read_bytes() for p in resumed.files}


def test_a_damaged_shard_is_made_again(tmp_path):
    fill(Store(tmp_path, rows=4), number_items(12))
    first, second, _ = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    second.write_bytes(b"nothing of the kind")
    store = Store(tmp_path, rows=4)
    fill(store, number_items(12))
    assert store.made == 8
    assert read_numbers(store, number_items(12)) == [n for n in range(12) if n % 7 != 6]


def test_a_half_written_file_is_not_taken_for_a_shard(tmp_path):
    store = Store(tmp_path, rows=4)
    fill(store, number_items(4))
    whole = store.files[0]
    whole.rename(tmp_path / f".{whole.name}.1.partial")
    store = Store(tmp_path, rows=4)
    assert not store.files
    fill(store, number_items(4))
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_a_full_disk_is_named_and_what_was_written_before_is_kept(tmp_path):
    resource = pytest.importorskip("resource")
    store, limits = Store(tmp_path, rows=4), resource.getrlimit(resource.RLIMIT_FSIZE)

    def grow(items):
        return (torch.zeros(WIDTH if n < 4 else 4096) for n in items)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(DataError, match=r"cannot be written \(File too large\).*make room"):
            fill(store, number_items(8), grow)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    assert isinstance(Store(tmp_path).find(make_key("item", 3)), tuple)


def test_a_disk_that_will_be_too_full_is_named_before_the_work_starts(tmp_path):
    with pytest.raises(DataError, match="too full"):
        Store(tmp_path).fill(number_items(4), fail, row_bytes=2**60)


def test_a_shard_that_another_thread_is_at_is_waited_for(tmp_path):
    started, release = threading.Event(), threading.Event()

    def slowly(items):
        started.set()
        release.wait(20)
        return write_numbers(items)

    first, second = Store(tmp_path), Store(tmp_path)
    thread = threading.Thread(target=fill, args=(first, number_items(4), slowly))
    thread.start()
    assert started.wait(20)
    threading.Timer(0.3, release.set).start()
    fill(second, number_items(4), fail)
    thread.join()
    assert (first.made, second.made) == (4, 0)
    assert read_numbers(second, number_items(4)) == [0, 1, 2, 3]


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dkd_trainer.data.cache import hold\n"
        "with hold(Path(sys.argv[1])) as state:\n    print(state, flush=True); time.sleep(60)"
    )
    lock = tmp_path / "a.lock"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ours\n"
        with hold(lock) as state:
            assert state == "taken"
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with hold(lock) as state:
            if state == "ours":
                return
    raise AssertionError("the lock outlived its process")


@pytest.mark.parametrize("name", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks_is_said_and_the_work_is_done_without(tmp_path, monkeypatch, name):
    fcntl = pytest.importorskip("fcntl", reason="Windows locks otherwise")

    def refuse(*_arguments):
        raise OSError(getattr(errno, name), "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):  # nor is it held by the file that the first try made
        with hold(tmp_path / "a.lock") as state:
            assert state == "none"
    store = Store(tmp_path / "cache", rows=4)
    fill(store, number_items(5))
    assert store.made == 5


def test_a_lock_whose_file_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), hold(tmp_path / "file" / "a.lock"):
        pass
