"""What the pack costs ComfyUI when it starts, measured in a fresh process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.5  # seconds
PROGRAM = """
import json, logging, sys, time
from pathlib import Path
from workflows.inprocess import boot

class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())

root, base, said = Path(sys.argv[1]), Path(sys.argv[2]), []
host = boot(base, cpu=True)
import comfy_config.config_parser  # what ComfyUI reads a pack's pyproject.toml with; pydantic is most of it
logging.getLogger().addHandler(Keep(logging.WARNING))
known, before = set(sys.modules), time.process_time()
host.load_pack(root)
seconds = time.process_time() - before
nodes = [name for name in host.nodes.NODE_CLASS_MAPPINGS if "DHA" in name or "Compare" in name]
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - known), "said": said, "nodes": nodes}))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    if importlib.util.find_spec("comfy") is None:
        pytest.skip("ComfyUI is not importable; put its folder on PYTHONPATH")
    paths = [os.environ.get("PYTHONPATH", ""), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path_factory.mktemp("comfyui"))]
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=tmp_path_factory.mktemp("elsewhere")
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


def test_import_time(loaded):
    """CPU time: on a busy machine the clock on the wall measures the others."""
    assert loaded["seconds"] < LIMIT, loaded["modules"]


def test_imports_nothing_of_the_trainer(loaded):
    roots = {name.partition(".")[0] for name in loaded["modules"]}
    assert not roots & {"dkd_trainer", "accelerate", "datasets", "diffusers", "tqdm"}
    assert "dha" not in roots, "the pack's own dha comes in under the pack's name"


def test_says_nothing(loaded):
    assert loaded["said"] == []


def test_every_node_is_there(loaded):
    assert set(loaded["nodes"]) >= {"LoadDHAStudent", "ApplyDHA", "DHACompareModels", "DHAComparePictures"}
