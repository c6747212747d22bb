"""`python -m dkd_trainer import`: a published DHA student becomes a file for Load DHA Student.

The published training changed the UNet's decoder as well, which a student's file cannot hold. With `--base` what
differs from that checkpoint is written beside the student, for ComfyUI's own *Load LoRA (Model)* at strength 1. The
control branch, without which a published student does not follow its source picture, is left out: it is read by
`python -m dkd_trainer control convert`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dha.checkpoint import fingerprint, save_student
from dha.config import DHAConfig
from dha.student import Student
from dha.whole_file import write_whole

from .published import UNET, Published, PublishedError, read_published, read_tensors

TRAINED = ("output_blocks.", "out.")  # of the trunk, by the published training


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dkd_trainer import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="the published student, a Lightning .ckpt or a .safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the student to write, for ComfyUI's models/dha")
    trunk = parser.add_mutually_exclusive_group(required=True)
    trunk.add_argument("--base", type=Path, help="the SD-2.1 checkpoint to compare with; what differs goes to *-trunk")
    trunk.add_argument("--without-trunk", action="store_true", help="drop the trained decoder: another, worse model")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of chosen tokens; earlier ones had 0.1")
    parser.add_argument("--norm-groups", type=int, default=4, help="of the transformers' norms (%(default)s)")
    parser.add_argument("--head-width", type=int, default=64, help="of the attention heads (%(default)s)")
    parser.add_argument("--prediction", choices=("eps", "v"), default="eps", help="of the base (%(default)s)")
    return parser.parse_args(arguments)


def import_student(args: argparse.Namespace) -> list[str]:
    """Write the student and, where the trunk differs, its trunk; what was done, line by line.

    Raises PublishedError, ConfigError or StudentFileError for what cannot become a student.
    """
    config = DHAConfig(mode="official", levels=(0, 1, 2, 3), sparsity=args.sparsity, norm_groups=args.norm_groups)
    published = read_published(args.checkpoint, config, args.head_width)
    base = {} if args.base is None else read_base(args.base, published)
    changed = find_changes(published.trunk, base) if base else {}
    origin = "unknown" if not base else fingerprint(base)
    record = {"imported": args.checkpoint.name, "dropped": dict(published.dropped), "trunk_tensors": len(changed)}
    save_student(args.out, build_student(config, published, args.head_width), origin, args.prediction, record)
    lines = [f"wrote {args.out}: {len(published.attention)} tensors of {published.architecture.label}"]
    for part, count in sorted(published.dropped.items()):
        lines.append(f"left out: {part}, {count} tensors, {published.dropped_weights[part] / 1e6:.1f} M weights")
    return [*lines, *write_trunk(args, published, changed)]


def build_student(config: DHAConfig, published: Published, head_width: int) -> Student:
    """The student with the published weights."""
    with torch.device("meta"):
        student = Student(config, published.architecture, head_width=head_width)
    student.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in student.named_weights().items():
            tensor.copy_(published.attention[name])
    return student


def read_base(path: Path, published: Published) -> dict[str, Tensor]:
    """The UNet of the checkpoint to compare with, by name; raises PublishedError where trunks do not match."""
    base = {k.removeprefix(UNET): v for k, v in read_tensors(path).items() if k.startswith(UNET)}
    expected = {name: tensor for name, tensor in base.items() if ".attn1." not in name}
    missing, surplus = sorted(set(expected) - set(published.trunk)), sorted(set(published.trunk) - set(expected))
    wrong = [k for k, v in expected.items() if k in published.trunk and published.trunk[k].shape != v.shape]
    if not base or missing or surplus or wrong:
        example = [*missing, *surplus, *wrong, "no UNet"][0]
        raise PublishedError(
            f"{path.name} is not the base of this student: of {len(expected)} tensors of its trunk {len(missing)} are "
            f"missing in the student, {len(surplus)} surplus, {len(wrong)} of another shape ({example}); give the "
            "SD-2.1-base checkpoint that it was trained from"
        )
    return base


def find_changes(trunk: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the trunk, in half precision, that differ there from the base's."""
    halves = {name: tensor.half() for name, tensor in trunk.items()}
    return {name: half for name, half in halves.items() if not torch.equal(half, base[name].half())}


def write_trunk(args: argparse.Namespace, published: Published, changed: Mapping[str, Tensor]) -> list[str]:
    """Write the changed trunk in the form in which ComfyUI's LoRA loader replaces weights; what was done."""
    if args.without_trunk:
        count = sum(name.startswith(TRAINED) for name in published.trunk)
        return [f"left out: {count} tensors of the decoder, which was trained too; the pictures will differ from it"]
    if not changed:
        return ["the trunk is that of the base in half precision: nothing else is needed"]
    path = args.out.with_name(f"{args.out.stem}-trunk.safetensors")
    tensors = {name_patch(name): tensor.contiguous() for name, tensor in changed.items()}
    metadata = {"modelspec.title": path.stem, "replaces": json.dumps(sorted({n.split(".")[0] for n in changed}))}
    write_whole(path, save(tensors, metadata))
    return [
        f"wrote {path}: {len(changed)} tensors of the trunk; put it into models/loras, strength 1, before Apply DHA"
    ]


def name_patch(name: str) -> str:
    """A weight's name in the LoRA loader's generic form, in which it replaces the model's own."""
    return f"diffusion_model.{name.removesuffix('.weight')}.set_weight"


def main(arguments: Sequence[str] | None = None) -> None:
    args = read_arguments(arguments)
    try:
        for line in import_student(args):
            print(line)
    except (OSError, ValueError) as error:
        sys.exit(f"dkd_trainer import: {error}")


if __name__ == "__main__":
    main()
