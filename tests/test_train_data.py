"""DKD Train reads pictures from the input folder and from folders that the server's owner allowed, no others."""

import sys

import pytest
from test_train_node import write_pairs


@pytest.fixture
def data(module, monkeypatch, tmp_path):
    """`nodes.train_data` with input and user folders of its own, below `tmp_path`."""
    import folder_paths

    for name in ("input", "user"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return module("train_data")


def test_a_folder_below_the_input_folder_may_be_read(data, tmp_path):
    folder = write_pairs(tmp_path / "input" / "deep" / "pairs")
    (folder / "again.png").symlink_to(folder / "red.png")
    assert data.find_data("deep/pairs", "").folder == folder
    assert data.find_data(str(folder), "").folder == folder


@pytest.mark.parametrize(
    "text", ["../secret", "pairs/../../secret", "{base}/secret", "linked", "linked/deep", "/", "~"]
)
def test_a_folder_elsewhere_is_refused(data, tmp_path, text):
    write_pairs(tmp_path / "secret" / "deep")
    write_pairs(tmp_path / "input" / "pairs")
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "secret")
    words = "does not exist" if text == "~" else "below ComfyUI's input folder, and .* is not there"
    with pytest.raises(ValueError, match=words):
        data.find_data(text.format(base=tmp_path), "owl")


@pytest.mark.parametrize("target", ["secret/red.png", "secret", "gone"])
def test_a_link_in_the_folder_that_leads_out_is_refused(data, tmp_path, target):
    write_pairs(tmp_path / "secret")
    (write_pairs(tmp_path / "input" / "pairs") / "link.png").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="link.png .* leads out"):
        data.find_data("pairs", "")


@pytest.mark.parametrize(
    ("text", "words"), [("nowhere", "does not exist"), ("file.txt", "is a file"), ("a\0b", "null")]
)
def test_what_is_no_folder_is_explained(data, tmp_path, text, words):
    (tmp_path / "input" / "file.txt").write_text("owl")
    with pytest.raises(ValueError, match=f"DKD Train.*{words}"):
        data.find_data(text, "")


def test_the_servers_owner_can_allow_another_folder(data, tmp_path):
    folder = write_pairs(tmp_path / "elsewhere" / "pairs")
    (tmp_path / "user" / data.PERMISSIONS).write_text(f"allowed_data_folders = ['{tmp_path / 'elsewhere'}']")
    assert data.find_data(str(folder), "").folder == folder
    with pytest.raises(ValueError, match="is not there"):
        data.find_data(str(tmp_path / "user"), "")


@pytest.mark.parametrize("text", ["allowed_data_folders = ['relative']", "allowed_data_folders = 1", "no toml"])
def test_a_wrong_permission_file_is_explained(data, tmp_path, text):
    (tmp_path / "user" / data.PERMISSIONS).write_text(text)
    with pytest.raises(ValueError, match="dkd_train.toml in ComfyUI's user folder"):
        data.find_data("pairs", "")


def test_a_python_that_cannot_read_toml_is_told_what_brings_it(data, module, monkeypatch, tmp_path):
    (tmp_path / "user" / data.PERMISSIONS).write_text("allowed_data_folders = []")
    monkeypatch.setattr(sys, "version_info", (3, 10, 14))
    monkeypatch.setitem(sys.modules, "tomli", None)  # as if it were not installed
    with pytest.raises(module("train_process").TrainerError, match="needs tomli; run .* -m pip install tomli"):
        data.find_data("pairs", "")


def test_changed_data_is_another_run(data, tmp_path):
    folder = write_pairs(tmp_path / "input" / "pairs")
    before = data.find_data("pairs", "").key
    (folder / ".hidden").write_text("")
    assert data.find_data("pairs", "").key == before
    (folder / "red.txt").write_text("another prompt")
    assert data.find_data("pairs", "").key != before
    assert data.find_data("", "owl").key == data.find_data("", " owl \n\n").key != data.find_data("", "cat").key
