"""Stage 2, imitation: the student runs on its own and its prediction is pulled to the teacher's."""

import torch
from torch import Tensor

from dha.patch import make_patches, plain_attention
from dha.student import Student

from .host import Teacher
from .transfer import relative_error


def student_options(student: Student, budget: float | None = None) -> dict:
    """`transformer_options` that run a student inside the teacher's UNet."""
    return make_patches(student, plain_attention, budget).as_options()


def imitation_losses(
    teacher: Teacher, student: Student, noisy: Tensor, t: Tensor, context: Tensor, budget: float | None = None
) -> dict[str, Tensor]:
    """Relative squared error of the student's prediction against the teacher's, with gradients to the student alone."""
    with torch.no_grad():
        target = teacher.predict(noisy, t, context)
    return {"output": relative_error(teacher.predict(noisy, t, context, student_options(student, budget)), target)}
