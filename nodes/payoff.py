"""Which layers get faster on the user's device: what DHA Measure Layers kept in ComfyUI's user folder, or shipped."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch

from ..dha.payoff import Payoff, choose_payoff
from ..dha.whole_file import write_whole
from .measured import read_measured

FORMAT = "dha-layers-1"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Row = list  # channels, tokens, share of them that are keys, how many times faster


def find_payoff(model) -> Payoff:
    """Which layers get faster on the device, and in the precision, that a model patcher computes in."""
    dtype = name_precision(model)
    return choose_payoff(read_measured()["layers"], model.load_device.type, dtype, read_rows(model, dtype))


def find_precision(model) -> torch.dtype:
    """What a model patcher computes in, as ModelComputeDtype may say; its weights may be kept in something else."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def name_precision(model) -> str:
    """`fp32`, `bf16`, `fp16`, or `other`."""
    return DTYPES.get(find_precision(model), "other")


def find_file() -> Path:
    return Path(folder_paths.get_user_directory()) / "dha" / "layers.json"


def stamp_file() -> int:
    """Another number whenever the file has been written; 0 where there is none."""
    try:
        return find_file().stat().st_mtime_ns
    except OSError:
        return 0


def read_tables() -> dict[str, dict[str, Any]]:
    """All that is kept, by device and precision; nothing where the file is missing or odd, which the log says."""
    file = find_file()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}, expected {FORMAT!r}")
        for table in found["tables"].values():
            for channels, tokens, share, speedup in table["rows"]:
                float(channels), float(tokens), float(share), float(speedup)
        return found["tables"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning("DHA: %s cannot be used (%s). Run DHA Measure Layers again, or delete it.", file, error)
        return {}


def name_table(model, dtype: str) -> str:
    """Under which the times of a model patcher's device are kept: another card has others."""
    return f"{comfy.model_management.get_torch_device_name(model.load_device)}, {dtype}"


def read_rows(model, dtype: str) -> list[Row]:
    """What was measured on a model patcher's device in a precision (`bf16`), nothing where nothing was."""
    return read_tables().get(name_table(model, dtype), {"rows": []})["rows"]


def keep_rows(model, dtype: str, rows: Iterable[Row], origin: dict[str, Any]) -> Path:
    """Put rows in the place of those of the same layers and shares; the file. Raises ValueError where it cannot be."""
    tables, name = read_tables(), name_table(model, dtype)
    kept = {tuple(row[:3]): row for row in [*tables.get(name, {"rows": []})["rows"], *rows]}
    tables[name] = {**origin, "rows": [kept[key] for key in sorted(kept)]}
    file = find_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"format": FORMAT, "tables": tables}, indent=1).encode())
    except OSError as error:
        raise ValueError(
            f"DHA Measure Layers cannot write {file.parent.name}/{file.name} into ComfyUI's user folder ({error}); "
            "make room or allow it, then queue it again."
        ) from error
    return file
