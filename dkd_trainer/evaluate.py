"""`python -m dkd_trainer.evaluate`: teacher and students on held-out pairs, as JSON, Markdown and pictures."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image

from .host import ROOT, Teacher, ensure_comfy


def read_arguments() -> argparse.Namespace:
    """The command line; the defaults evaluate the shipped models."""
    models = ROOT / "workflows" / "models"
    parser = argparse.ArgumentParser(prog="python -m dkd_trainer.evaluate", description=__doc__)
    parser.add_argument("--teacher", type=Path, default=models / "checkpoints" / "mini-sd21.safetensors")
    parser.add_argument("--students", type=Path, nargs="+", default=[models / "dha" / "mini-sd21-dha.safetensors"])
    parser.add_argument("--held-out", type=Path, required=True, help="folder of pairs that training never saw")
    parser.add_argument("--scorer", type=Path, help="prompt scorer from dkd_trainer.metrics.prompt_score")
    parser.add_argument("--count", type=int, default=256, help="held-out pairs to use")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels (mini teacher: 128)")
    parser.add_argument("--token-budget", type=float, help="another budget than the students' own")
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--comfyui", help="ComfyUI's folder, when it is not on PYTHONPATH (or COMFYUI_PATH)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    return parser.parse_args()


def list_subjects(teacher: Teacher, files: list[Path], budget: float | None) -> list:
    """The teacher, the teacher with fewer steps (a harmless change), training-free, and every student."""
    from dha.checkpoint import check_architecture, load_student
    from dha.config import DHAConfig
    from dha.student import Student

    from .evaluation import Subject
    from .imitation import student_options

    subjects = [Subject("teacher"), Subject("teacher, 20 steps", steps=20)]
    students = []
    for file in files:
        student = load_student(file, head_width=teacher.head_width).to(teacher.device)
        check_architecture(file.name, student.architecture, teacher.architecture)
        students.append((file.stem, student))
    first = students[0][1].config
    free = DHAConfig(levels=first.levels, token_budget=first.token_budget, max_tokens=first.max_tokens)
    students.insert(0, ("training-free", Student(free, teacher.architecture)))
    return [*subjects, *(Subject(name, student_options(student, budget)) for name, student in students)]


def to_markdown(rows: dict[str, dict]) -> str:
    """Rows by subject as a table; missing values as a dash."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| subject | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.4g}" if isinstance(row.get(c), float) else "-" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_sheet(path: Path, pictures: list[torch.Tensor], columns: int = 12) -> None:
    """One row per subject with the same prompts and seeds; below, four times the last one's difference to the first."""
    shown = [p[:columns] for p in pictures]
    shown.append(((shown[-1] - shown[0]).abs() * 4).clamp(max=1))
    rows = [torch.cat(list(row), dim=2) for row in shown]
    array = (torch.cat(rows, dim=1) * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    args = read_arguments()
    ensure_comfy(args.comfyui)
    from .evaluation import compare_pictures, draw_pictures, measure_errors, read_real
    from .loop import current_command, current_commit
    from .metrics.features import load_feature_net
    from .metrics.prompt_score import load_prompt_scorer
    from .pairs import find_pairs, load_encoded

    teacher = Teacher(args.teacher, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pairs, _ = find_pairs(args.held_out)
    pairs = pairs[: args.count]
    args.out.mkdir(parents=True, exist_ok=True)
    encoded, _ = load_encoded(pairs, args.size, teacher, args.out / "cache")
    real, prompts = read_real([p.picture for p in pairs], args.size), [p.prompt for p in pairs]
    net, scorer = load_feature_net(), load_prompt_scorer(args.scorer) if args.scorer else None
    rows, sheets, reference = {}, [], None
    for subject in list_subjects(teacher, args.students, args.token_budget):
        errors = (
            {}
            if not subject.options
            else {f"error {k}": v for k, v in measure_errors(teacher, subject, encoded).items()}
        )
        pictures = draw_pictures(teacher, subject, encoded, args.cfg)
        reference = pictures if reference is None else reference
        rows[subject.name] = {**errors, **compare_pictures(pictures, reference, real, prompts, net, scorer)}
        sheets.append(pictures)
        print(subject.name, json.dumps(rows[subject.name]), flush=True)
    rows["real pictures"] = compare_pictures(real, real, real, prompts, None, scorer)
    record = {
        "command": current_command("dkd_trainer.evaluate"),
        "commit": current_commit(),
        "pairs": len(pairs),
    }
    write_text(args.out / "evaluation.json", json.dumps({**record, "rows": rows}, indent=1))
    write_text(args.out / "evaluation.md", to_markdown(rows))
    save_sheet(args.out / "evaluation.png", sheets)
    print(f"wrote {args.out}/evaluation.json, .md and .png")


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError, ImportError) as error:
        sys.exit(f"dkd_trainer.evaluate: {error}")
