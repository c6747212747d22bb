"""What the published distillation adds for students of mode `official`, with its defects repaired."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dha.official import OfficialSite
from dha.student import Student

from ..host import Teacher
from .features import Features
from .transfer import ROUTING_QUERIES, routing_loss

TEMPERATURE = 4.0


def start_student(student: Student, teacher: Teacher) -> Student:
    """Fresh weights of either mode; a published layer takes over its teacher's projections. Returns the student."""
    if student.config.mode != "official":
        return student.start()
    for site in student.list_sites():
        start_site(student.site(site), teacher.attention(site))
    return student


@torch.no_grad()
def start_site(module: OfficialSite, attention: nn.Module) -> None:
    """Self-attention is the teacher's, the external attention starts silent, alpha at the published 0.1."""
    for name in ("to_q", "to_k", "to_v"):
        getattr(module.sa_attn, name).weight.copy_(getattr(attention, name).weight)
    module.sa_attn.to_out[0].weight.copy_(attention.to_out[0].weight)
    module.sa_attn.to_out[0].bias.copy_(attention.to_out[0].bias)
    nn.init.normal_(module.ea_attn.k, std=module.ea_attn.k.shape[1] ** -0.5)
    nn.init.zeros_(module.ea_attn.v)
    module.ea_attn.norm.reset_parameters()
    for layer in (module.gating_network[0], module.gating_network[2]):
        nn.init.normal_(layer.weight, std=layer.weight.shape[1] ** -0.5)
        nn.init.zeros_(layer.bias)
    module.global_alpha.fill_(0.1)


def teach_routers(teacher: Teacher, student: Student, shown: Features, seed: int) -> Tensor:
    """Mean routing loss of the published routers on the teacher's inputs; in published form they get no gradient."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for site in student.list_sites():
        module, x = student.site(site), shown.inputs[site.block]
        gate = module.gating_network(shown.emb)
        gate = F.layer_norm(gate.float(), gate.shape[-1:]).to(x.dtype)
        scores = torch.einsum("bnc,bc->bn", x, gate) * x.shape[-1] ** -0.5
        losses.append(routing_loss(scores, teacher.attention(site), x, generator))
    return torch.stack(losses).mean()


def compare_maps(teacher: Teacher, student: Student, imitated: Features, shown: Features, seed: int) -> Tensor:
    """Mean KL, at temperature 4, of the chosen tokens' attention maps from the teacher's over the same tokens.

    The published form compares the cross-attention's maps, without a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for site in student.list_sites():
        module, attention = student.site(site), teacher.attention(site)
        x, taught = imitated.inputs[site.block], shown.inputs[site.block]
        chosen = module.choose(x, imitated.emb)[..., None].expand(-1, -1, x.shape[-1])
        picks = torch.randperm(chosen.shape[1], generator=generator)[:ROUTING_QUERIES].to(x.device)
        x, taught = x.gather(1, chosen), taught.gather(1, chosen)
        with torch.no_grad():
            target = log_map(attention.to_q(taught[:, picks]), attention.to_k(taught), attention.heads)
        found = log_map(module.sa_attn.to_q(x[:, picks]), module.sa_attn.to_k(x), attention.heads)
        losses.append((target.exp() * (target - found)).sum(-1).mean())
    return torch.stack(losses).mean()


def log_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Log-probabilities (B, heads, queries, keys) of softmax(q k / (T sqrt(d)))."""
    q, k = (a.unflatten(-1, (heads, -1)).transpose(1, 2).float() for a in (q, k))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 / TEMPERATURE).log_softmax(-1)
