"""Fetch the emoji art, released as npm packages, into a working folder."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

from tqdm import tqdm

# style name in captions -> (npm package, version, licence of the art)
ICON_SETS = {
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "blob": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    "gradient": ("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "glossy 3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "MIT"),
    "twitter": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    "emojione": ("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    "firefox": ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
}
NAMES = ("emojibase-data", "17.0.0", "MIT")


def archive_name(package: str, version: str) -> str:
    """Name of the file that `npm pack` writes for a package."""
    return f"{package.lstrip('@').replace('/', '-')}-{version}"


def fetch_packages(folder: Path) -> None:
    """Download and unpack every package once; a broken download leaves nothing behind.

    Raises RuntimeError when npm is missing or a package cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(p, v) for p, v, _ in [*ICON_SETS.values(), NAMES] if not (folder / archive_name(p, v)).is_dir()]
    if missing and not shutil.which("npm"):
        raise RuntimeError("npm was not found; install Node.js: the emoji art comes as npm packages")
    for package, version in tqdm(missing, desc="packages", disable=not missing):
        fetch_package(folder, package, version)


def fetch_package(folder: Path, package: str, version: str) -> None:
    """Download one package with `npm pack` and unpack it to its final name in one rename."""
    name = archive_name(package, version)
    archive = folder / f"{name}.tgz"
    if not archive.exists():
        done = subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"npm could not fetch {package}@{version}: {done.stderr.strip()[-300:]}")
    partial = folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
    except (tarfile.TarError, EOFError) as error:
        archive.unlink()
        raise RuntimeError(f"{archive.name} was damaged and has been removed; run the same command again") from error
    (partial / "package").rename(folder / name)
    shutil.rmtree(partial)


def read_json(path: Path):
    """Parse one JSON file of a package."""
    return json.loads(path.read_text(encoding="utf-8"))
