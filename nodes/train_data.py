"""What DKD Train learns from: a folder that it may read, or prompts that the teacher draws for."""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from .train_process import check_needs

PERMISSIONS = "dkd_train.toml"  # in ComfyUI's user folder, where only the server's owner can write
ALLOWED = "allowed_data_folders"


@dataclass(frozen=True)
class Data:
    """A folder of pictures with prompts, or the prompts alone; `key` changes with what is in it."""

    folder: Path | None
    prompts: tuple[str, ...]
    key: str

    def describe(self) -> str:
        return self.folder.name if self.folder else f"{len(self.prompts)} prompts"


def find_data(folder: str, prompts: str) -> Data:
    """The data set that the two inputs name; raises ValueError for a folder out of bounds and for no data at all."""
    if folder.strip():
        path = confine_folder(folder.strip())
        return Data(path, (), hash_listing(path))
    lines = tuple(filter(None, map(str.strip, prompts.splitlines())))
    if not lines:
        raise ValueError(
            "DKD Train found neither a data folder nor prompts; name a folder below ComfyUI's input folder, or write "
            "one prompt a line"
        )
    return Data(None, lines, hashlib.sha256("\n".join(lines).encode()).hexdigest())


def confine_folder(text: str) -> Path:
    """The folder that a text names, as seen from ComfyUI's input folder; raises ValueError where it may not be read."""
    roots = [Path(folder_paths.get_input_directory()).resolve(), *read_permissions()]
    try:
        path = (roots[0] / text).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a zero byte
        raise ValueError(f"DKD Train cannot read the data folder {text!r}: {error}") from error
    if not is_inside(path, roots):
        raise ValueError(
            f"DKD Train reads data below ComfyUI's input folder, and {text!r} is not there; move the folder there, or "
            f'let the owner of this server write {ALLOWED} = ["/the/folder"] into {PERMISSIONS} in ComfyUI\'s user '
            "folder"
        )
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ValueError(
            f"DKD Train: the data folder {text!r} {found}; expected a folder below ComfyUI's input folder with "
            "pictures beside .txt files of the same name, with image/ and prompt/, or with .tar shards"
        )
    check_links(path, roots)
    return path


def is_inside(path: Path, roots: list[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def check_links(folder: Path, roots: list[Path]) -> None:
    """Raise ValueError for a link below the folder that leads out of what may be read."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not is_inside(Path(os.path.realpath(path)), roots):
                raise ValueError(
                    f"DKD Train: {path.relative_to(folder).as_posix()} in the data folder is a link that leads out of "
                    "the folders that may be read; put the file itself there"
                )


def hash_listing(folder: Path) -> str:
    """Changes when a file below the folder is added, removed, renamed or written."""
    digest = hashlib.sha256(str(folder).encode())
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))  # the trainer leaves hidden ones out
        for path in (Path(place, name) for name in sorted(files) if not name.startswith(".")):
            stat = path.stat() if path.exists() else path.lstat()
            digest.update(f"{path}|{stat.st_size}|{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_permissions() -> list[Path]:
    """The folders that the server's owner allows beside ComfyUI's input folder; raises ValueError for a wrong file."""
    path = Path(folder_paths.get_user_directory()) / PERMISSIONS
    if not path.is_file():
        return []
    folders = read_toml(path).get(ALLOWED, [])
    if not isinstance(folders, list) or not all(isinstance(each, str) and Path(each).is_absolute() for each in folders):
        raise ValueError(f"{PERMISSIONS} in ComfyUI's user folder: {ALLOWED} is {folders!r}, expected a list of paths")
    return [Path(each).resolve() for each in folders]


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ValueError for a wrong file, and TrainerError where Python cannot read any."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        check_needs(["tomli"])
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} in ComfyUI's user folder is not a TOML file: {error}") from error
