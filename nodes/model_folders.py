"""Where ComfyUI finds students and frequency controls: models/dha, models/dha_control, and what comes with the pack."""

import contextlib
from pathlib import Path

import folder_paths

STUDENTS, CONTROLS = "dha", "dha_control"
SHIPPED = Path(__file__).resolve().parent.parent / "workflows" / "models"


def register() -> None:
    """Add models/dha and models/dha_control as the first of their kinds, and the pack's folders as the last.

    Calling it again changes nothing.
    """
    for name in (STUDENTS, CONTROLS):
        own = Path(folder_paths.models_dir) / name
        with contextlib.suppress(OSError):  # a read-only models folder is no reason to go without the nodes
            own.mkdir(parents=True, exist_ok=True)
        folder_paths.add_model_folder_path(name, str(own), is_default=True)
        folder_paths.add_model_folder_path(name, str(SHIPPED / name))
        folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(name), {".safetensors"})
    folder_paths.add_model_folder_path("checkpoints", str(SHIPPED / "checkpoints"))
