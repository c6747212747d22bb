"""Start a real ComfyUI, run the compare graph, leave a report: `python -m workflows.demo --comfyui PATH`."""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from ..graphs import CHECKPOINT, STUDENT
from ..machine import describe_machine
from ..server import PACK, ServerError, find_comfyui, is_fast_in_bf16, serve
from .measure import BF16_FLAGS, PROMPTS, compare_prompts, find_obstacle, time_fullsize
from .report import check_out, write_report
from .results import Results, show

MODELS = {
    PACK / "workflows" / "models" / "checkpoints" / CHECKPOINT: "the mini SD-2.1",
    PACK / "workflows" / "models" / "dha" / STUDENT: "its DHA student",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workflows.demo", description=__doc__)
    parser.add_argument("--comfyui", help="folder of a ComfyUI (default: COMFYUI_PATH)")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of the report (%(default)s)")
    parser.add_argument(
        "--prompts", type=int, default=6, choices=range(1, len(PROMPTS) + 1), metavar="N", help="how many (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps of the mini model (%(default)s)")
    parser.add_argument("--no-fullsize", action="store_true", help="leave out the speed of the full-size architecture")
    return parser.parse_args()


def check_models() -> None:
    """Raises FileNotFoundError where a model file of this repository is missing."""
    for path, what in MODELS.items():
        if not path.is_file():
            raise FileNotFoundError(
                f"{path.relative_to(PACK)} ({what}) is missing; it is part of the repository. Restore it with "
                f"`git checkout -- {path.relative_to(PACK).as_posix()}`, or train it anew as the README says."
            )


def compare_pictures(arguments: argparse.Namespace, comfyui: Path, base: Path) -> Results:
    """The mini model's pictures, with and without its student."""
    begun = time.monotonic()
    print("[1/4] Starting ComfyUI with this pack installed ...", flush=True)
    with serve(comfyui, base) as server:
        results = Results(describe_machine(server, "workflows.demo"), CHECKPOINT, STUDENT)
        print(f"      ComfyUI {results.machine.comfyui} is up at {server.url}, device {results.machine.device}")
        print(f"[2/4] {arguments.prompts} prompts through the mini SD-2.1 and its DHA student", flush=True)
        prompts = PROMPTS[: arguments.prompts]
        for comparison in compare_prompts(server, CHECKPOINT, STUDENT, prompts, arguments.steps):
            results.comparisons.append(comparison)
            if len(results.comparisons) == 1:
                print(f"      The first pictures took {time.monotonic() - begun:.0f} s from the start", flush=True)
    return results


def measure(arguments: argparse.Namespace, comfyui: Path, base: Path) -> Results:
    """Both measurements, each on a server of its own; what goes wrong at full size is kept in the results."""
    results = compare_pictures(arguments, comfyui, base)
    print("[3/4] Speed of the full-size SD-2.1 architecture with random weights", flush=True)
    results.speed_problem = "Left out with --no-fullsize." if arguments.no_fullsize else find_obstacle(base)
    if not results.speed_problem:
        try:
            # Pictures are compared in fp32, to see nothing but DHA; speed is what a user could have at best.
            bf16 = is_fast_in_bf16()
            with serve(comfyui, base, flags=BF16_FLAGS if bf16 else None) as server:
                results.speed = time_fullsize(server, comfyui, base, "bf16" if bf16 else "")
        except (ServerError, RuntimeError) as error:
            results.speed_problem = f"Failed: {error}"
    if results.speed_problem:
        print(f"      {results.speed_problem}", flush=True)
    return results


def run_demo(arguments: argparse.Namespace) -> int:
    """Exit status: 0, or 1 where the full-size run failed."""
    start = time.monotonic()
    comfyui, out = find_comfyui(arguments.comfyui), arguments.out.resolve()
    check_models()
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the report rather than in the system's temporary folder, which may be too small for a checkpoint.
    with tempfile.TemporaryDirectory(prefix=".demo-work-", dir=out.parent, ignore_cleanup_errors=True) as work:
        results = measure(arguments, comfyui, Path(work).resolve())
    print("[4/4] Writing the report", flush=True)
    write_report(out, results)
    print(f"\nQuality (mini SD-2.1 on emoji art): mean PSNR {show(results.average('psnr'), 1)} dB to the original")
    if results.speed:
        settings = f"{results.speed['width']}x{results.speed['height']}, {results.speed['dtype']}"
        print(f"Speed (full-size SD-2.1, random weights, {settings}): {results.speed['speedup']:.2f}x")
    print(f"Report: {out / 'report.html'}\nPictures and tables: {out}\nTook {time.monotonic() - start:.0f} s")
    return int(results.speed_problem.startswith("Failed"))


def main() -> None:
    # So that the server is stopped and the working folder removed when this program is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(run_demo(parse_arguments()))
    except (FileNotFoundError, FileExistsError, ServerError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was left behind")


if __name__ == "__main__":
    main()
