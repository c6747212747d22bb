"""The layers hold: `nodes -> dha <- dkd_trainer`, `scripts -> dha`, root -> `nodes`; lint and types are clean."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"dha", "dkd_trainer", "nodes", "workflows"}
NODE_API = {"comfy_api", "comfy_api_nodes"}
PARTS = ("data", "engine", "mini", "metrics", "evidence", "control")  # of dkd_trainer; each imports those before it
LONGEST = 300  # lines of a file
PURE = {"torch", "safetensors", "numpy"} | set(sys.stdlib_module_names)


def find_sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def read_imports(place: Path, source: str) -> Iterator[tuple[bool, str]]:
    """Every import of a file at `place` below the root, as (relative, top-level module); function bodies count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield False, (node.module or "").split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            above = len(place.parts) - node.level
            assert above >= 0, f"{place}:{node.lineno} imports from outside of the repository"
            package = [*place.parts[:above], *(node.module or "").split(".")]
            yield from ((True, [*filter(None, package), alias.name][0]) for alias in node.names)


def find_fault(layer: str, relative: bool, module: str) -> str | None:
    """What is wrong with an import in a file of `layer`, or None."""
    if layer == "dha" and module not in ({"dha"} if relative else PURE):
        return "dha imports torch, safetensors, numpy and the standard library, and itself relatively"
    if layer == "nodes" and (module not in {"nodes", "dha"} if relative else module in OURS):
        return "nodes imports itself and dha, both relatively"
    if layer == "dkd_trainer" and (module != "dkd_trainer" if relative else module in {"nodes", "workflows"}):
        return "dkd_trainer imports itself, and dha by name"
    if layer == "scripts" and (relative or module in OURS - {"dha"}):
        return "scripts imports dha, by name"
    if layer == "__init__.py" and (relative, module) != (True, "nodes"):
        return "the root imports nodes, relatively"
    if layer != "nodes" and not relative and module in NODE_API:
        return "ComfyUI's node API is for nodes alone"
    return None


def find_backward_imports(place: Path, source: str) -> list[str]:
    """Imports of a file of dkd_trainer that go against the order of its parts; what lies beside them knows none."""
    own = place.parts[1] if len(place.parts) > 2 else ""
    allowed = PARTS[: PARTS.index(own) + 1] if own else ()
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = [*place.parts[: len(place.parts) - node.level], *filter(None, (node.module or "").split("."))]
            found |= {[*package, alias.name][1] for alias in node.names}
    return [f"{place} imports {name}" for name in sorted(found & set(PARTS)) if name not in allowed]


def find_faults(place: Path, source: str) -> list[str]:
    imports = sorted(set(read_imports(place, source)))
    return [
        f"{place} imports {name}: {why}"
        for relative, name in imports
        if (why := find_fault(place.parts[0], relative, name))
    ]


@pytest.mark.parametrize("layer", [*sorted(OURS), "scripts", "__init__.py"])
def test_imports_follow_the_layers(layer):
    files = [ROOT / layer] if layer.endswith(".py") else find_sources(layer)
    assert files
    faults = [
        fault for file in files for fault in find_faults(file.relative_to(ROOT), file.read_text(encoding="utf-8"))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("dha/student.py", "import comfy.ops"),
        ("dha/student.py", "from dha.config import DHAConfig"),
        ("dha/student.py", "from ..nodes import load"),
        ("dha/student.py", "from .. import nodes"),
        ("dha/student.py", "def load():\n    import einops"),
        ("nodes/load.py", "from dha.config import DHAConfig"),
        ("nodes/load.py", "from .. import dkd_trainer"),
        ("nodes/load.py", "import nodes"),
        ("dkd_trainer/mini/data.py", "from nodes import mini_sd21"),
        ("dkd_trainer/mini/data.py", "from ...dha import config"),
        ("dkd_trainer/host.py", "from comfy_api.latest import io"),
        ("workflows/server.py", "import comfy_api.latest"),
        ("scripts/dynamic_hybrid_attention.py", "from nodes import apply"),
        ("__init__.py", "from .dha import config"),
        ("__init__.py", "from nodes import comfy_entrypoint"),
    ],
)
def test_a_wrong_import_is_found(place, source):
    assert len(find_faults(Path(place), source)) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        (
            "dha/student.py",
            "import math\nimport torch.nn.functional\nfrom . import config\nfrom .config import DHAConfig",
        ),
        ("nodes/load.py", "import comfy.sd\nfrom comfy_api.latest import io\nfrom ..dha.config import DHAConfig"),
        (
            "dkd_trainer/mini/data.py",
            "from dha.config import DHAConfig\nfrom ..host import ensure_comfy\nimport comfy.sd",
        ),
        ("__init__.py", "from .nodes import WEB_DIRECTORY, comfy_entrypoint"),
    ],
)
def test_a_right_import_passes(place, source):
    assert find_faults(Path(place), source) == []


def test_the_parts_of_the_trainer_depend_one_way():
    files = [file for file in find_sources("dkd_trainer") if file.name != "__main__.py" or file.parent.name in PARTS]
    assert {file.parent.name for file in files} == {"dkd_trainer", *PARTS}
    faults = [find_backward_imports(file.relative_to(ROOT), file.read_text(encoding="utf-8")) for file in files]
    assert not sum(faults, [])


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("dkd_trainer/data/corpus.py", "from ..engine.state import StateFolder"),
        ("dkd_trainer/engine/loop.py", "def run():\n    from ..evidence import charts"),
        ("dkd_trainer/engine/loop.py", "from .. import evidence"),
        ("dkd_trainer/host.py", "from .data.cache import Store"),
    ],
)
def test_an_import_against_the_order_is_found(place, source):
    assert len(find_backward_imports(Path(place), source)) == 1


def test_no_file_of_the_library_is_too_long():
    files = [file for folder in OURS for file in find_sources(folder)]
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert lengths and not {file: length for file, length in lengths.items() if length > LONGEST}


def test_no_file_is_named_for_leftovers():
    names = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    files = [file for folder in [*OURS, "scripts", "tests"] for file in find_sources(folder)]
    assert files and not [str(file) for file in files if file.name in names]


def test_root_module_holds_the_entry_point_and_nothing_else():
    docstring, entry, exported = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    assert ast.unparse(entry) == "from .nodes import WEB_DIRECTORY, comfy_entrypoint"
    assert ast.unparse(exported) == "__all__ = ['WEB_DIRECTORY', 'comfy_entrypoint']"


def test_every_package_of_the_library_is_declared():
    declared = re.search(r"^packages = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S)
    folders = {file.parent for layer in ("dha", "dkd_trainer") for file in find_sources(layer)}
    assert set(re.findall(r'"(.*?)"', declared[1])) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


@pytest.mark.parametrize("command", [("ruff", "check", "--no-cache"), ("mypy", "--no-incremental")], ids=lambda c: c[0])
def test_static_check_is_clean(command):
    pytest.importorskip(command[0], reason="comes with `python3 install.py --test`")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
