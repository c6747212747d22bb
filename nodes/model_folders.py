"""Where ComfyUI finds students: models/dha, and the small models shipped with the pack for its example workflows."""

import contextlib
from pathlib import Path

import folder_paths

STUDENTS = "dha"
SHIPPED = Path(__file__).resolve().parent.parent / "workflows" / "models"


def register() -> None:
    """Add our folders after the user's own; calling it again changes nothing."""
    own = Path(folder_paths.models_dir) / STUDENTS
    with contextlib.suppress(OSError):  # a read-only models folder is no reason to go without the nodes
        own.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(STUDENTS, str(own), is_default=True)
    folder_paths.add_model_folder_path(STUDENTS, str(SHIPPED / "dha"))
    folder_paths.folder_names_and_paths[STUDENTS] = (folder_paths.get_folder_paths(STUDENTS), {".safetensors"})
    folder_paths.add_model_folder_path("checkpoints", str(SHIPPED / "checkpoints"))
