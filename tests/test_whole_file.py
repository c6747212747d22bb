"""Files are written whole or not at all, whoever writes at the same time."""

import pytest

from dha.whole_file import replace_whole, write_whole


def test_a_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with replace_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone_and_nothing_beside_it(tmp_path, begun, error):
    path = tmp_path / "report.json"
    write_whole(path, b"old")
    with pytest.raises(error), replace_whole(path) as partial:
        if begun:
            partial.write_text("half")
        raise error
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_two_writers_of_one_process_number_do_not_write_to_one_place(tmp_path):
    """Containers on several hosts that share a folder may have it."""
    path = tmp_path / "report.json"
    with replace_whole(path) as first, replace_whole(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first.read_text() == "first"
    assert path.read_text() == "first" and [*tmp_path.iterdir()] == [path]


def test_a_student_whose_copy_fails_leaves_the_one_before(module, monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "dha", ([str(tmp_path / "models")], {".safetensors"}))
    run = module("train_run").Run("owl", tmp_path, 1)
    run.student.write_bytes(b"first")
    installed = module("train_run").install_student(run)
    run.student.unlink()
    run.student.symlink_to("/proc/self/mem")  # opens, and cannot be read
    with pytest.raises(OSError):
        module("train_run").install_student(run)
    assert installed.read_bytes() == b"first" and [*installed.parent.iterdir()] == [installed]


def test_a_teacher_half_written_by_a_killed_server_is_removed(module, tmp_path):
    run = module("train_run").Run("owl", tmp_path, 1)
    half, other = (tmp_path / f".{name}.7-ab.partial" for name in ("teacher.safetensors", "journal.jsonl"))
    half.touch(), other.touch()
    with module("train_run").occupy(run):
        assert not half.exists() and other.exists()
