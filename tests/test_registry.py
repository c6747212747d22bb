"""What the Comfy Registry and ComfyUI-Manager read of this pack: pyproject.toml, as their own readers understand it."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
from conftest import ROOT

ICON = ROOT / "web" / "icon.svg"
LARGEST = 400  # pixels of an icon's side
# In a process of its own: the reader is a part of ComfyUI's tree, which has a module `utils` and others of plain names.
HOST_READER = """
import sys
from comfy_config.config_parser import extract_node_configuration
print(extract_node_configuration(sys.argv[1]).model_dump_json())
"""


def read_with_host():
    if importlib.util.find_spec("comfy_config") is None:
        pytest.skip("ComfyUI is not importable; put its folder on PYTHONPATH")
    command = [sys.executable, "-c", HOST_READER, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return SimpleNamespace(**found["project"]), SimpleNamespace(**found["tool_comfy"])


def test_the_host_reads_what_the_registry_requires():
    project, comfy = read_with_host()
    assert re.fullmatch(r"(?!.*[-_.]{2})[a-z][a-z0-9._-]{0,98}", project.name) and "comfyui" not in project.name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert comfy.display_name and len(project.description) < 200
    assert project.supported_comfyui_version == ">=0.3.64"


def find_placeholders(publisher: str, name: str, links: list[str]) -> list[str]:
    """What would be published as it is although nobody has set it; account and links are set together or not at all."""
    real = r"https://(?!.*(example\.|username|<|localhost)).+"
    faults = [link for link in links if link and not re.fullmatch(real, link)]
    if publisher and (not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", publisher) or publisher in (name, "publisher")):
        faults.append(publisher)
    return faults if all((publisher, *links)) or not any((publisher, *links)) else [*faults, "some are missing"]


def test_nothing_is_published_under_a_placeholder():
    """Without a publisher the registry's tool refuses to publish; a made-up one would be taken."""
    project, comfy = read_with_host()
    needed = [project.urls["repository"], comfy.icon]
    assert find_placeholders(comfy.publisher_id, project.name, [*needed, *filter(None, project.urls.values())]) == []
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all(f"`{name}" in contributing for name in ("PublisherId", "Repository", "Icon"))


@pytest.mark.parametrize(
    ("publisher", "links", "faults"),
    [
        ("", ["", ""], 0),
        ("somebody", ["https://git.org/somebody/pack", "https://git.org/somebody/pack/icon.svg"], 0),
        ("pack", ["https://git.org/somebody/pack", "https://git.org/somebody/pack/icon.svg"], 1),
        ("somebody", ["https://git.org/username/pack", "https://git.org/somebody/pack/icon.svg"], 1),
        ("somebody", ["", ""], 1),
        ("", ["https://git.org/somebody/pack", ""], 1),
        ("<your id>", ["https://git.org/somebody/pack", "https://git.org/somebody/pack/icon.svg"], 1),
    ],
)
def test_a_placeholder_is_found(publisher, links, faults):
    assert len(find_placeholders(publisher, "pack", links)) == faults


def test_the_version_is_the_one_that_the_changelog_begins_with():
    project, _ = read_with_host()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(.+?)\]", changelog, re.M)[1] == project.version


def test_the_icon_is_one_that_the_registry_takes():
    picture = ElementTree.parse(ICON).getroot()
    assert picture.tag.endswith("}svg")
    assert 0 < int(picture.get("width")) <= LARGEST and picture.get("width") == picture.get("height")
    assert not re.search(r"href|<script|<image", ICON.read_text()), "it stands alone"


def test_the_registrys_own_tool_accepts_it():
    """`comfy node validate`, of the package comfy-cli: metadata and a search for forbidden calls."""
    if not (comfy := shutil.which("comfy")):
        pytest.skip("comfy-cli is not installed; in an environment of its own: pip install comfy-cli")
    command = [comfy, "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "passed" in said and "Warning" not in said, said
