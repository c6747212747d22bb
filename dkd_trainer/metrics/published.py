"""LPIPS, CLIP score and FID features by their own packages, where package and weights already are on this machine.

Nothing here downloads: weights that are not in torch's hub cache, or named by the user, make the metric missing.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

LPIPS_WEIGHTS = "alexnet-owt-*.pth"
FID_WEIGHTS = "pt_inception-2015-12-05-*.pth"


def find_published(clip_weights: Path | None, clip_model: str) -> tuple[dict[str, dict], dict[str, str]]:
    """The metrics that can be computed here as functions (see `evidence.judges`), and by name why others cannot.

    Raises FileNotFoundError for named weights that are not there.
    """
    if clip_weights is not None and not clip_weights.is_file():
        raise FileNotFoundError(f"there are no CLIP weights at {clip_weights}; leave --clip-weights out to go without")
    missing = {
        "LPIPS": find_lack("lpips", find_cached(LPIPS_WEIGHTS), f"torch's hub cache holds no {LPIPS_WEIGHTS}"),
        "CLIP score": find_lack("open_clip", clip_weights, "no --clip-weights was given"),
        "FID": find_lack("pytorch_fid", find_cached(FID_WEIGHTS), f"torch's hub cache holds no {FID_WEIGHTS}"),
    }
    found: dict[str, dict] = {"alone": {}, "pairs": {}}
    if missing["LPIPS"] is None:
        found["pairs"]["lpips"] = load_lpips()
    if missing["CLIP score"] is None:
        found["alone"]["clip_score"] = load_clip(clip_weights, clip_model)
    if missing["FID"] is None:
        found["alone"]["inception"] = load_inception()
    return found, {name: why for name, why in missing.items() if why is not None}


def find_lack(package: str, weights: Path | None, without: str) -> str | None:
    """Why a metric cannot be computed, or None."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    return None if weights is not None else without


def find_cached(pattern: str) -> Path | None:
    """A file of torch's hub cache."""
    return next(iter(sorted(Path(torch.hub.get_dir(), "checkpoints").glob(pattern))), None)


def load_lpips():
    """LPIPS (arXiv 1801.03924) on AlexNet, (b,), of pictures (b, 3, H, W) in [0, 1]."""
    import lpips

    net = lpips.LPIPS(net="alex", verbose=False).eval()
    return torch.no_grad()(lambda first, second: net(first * 2 - 1, second * 2 - 1).flatten())


def load_clip(weights: Path, model: str):
    """CLIP score (arXiv 2104.08718), (b,): 100 times the cosine of picture and prompt, at least 0."""
    import open_clip

    net, _, _ = open_clip.create_model_and_transforms(model, pretrained=str(weights))
    tokenize, statistics = open_clip.get_tokenizer(model), (net.visual.image_mean, net.visual.image_std)
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
    sides = net.visual.image_size if isinstance(net.visual.image_size, tuple) else (net.visual.image_size,) * 2
    net.eval()

    @torch.no_grad()
    def score(pictures: Tensor, prompts: list[str]) -> Tensor:
        resized = torch.nn.functional.interpolate(pictures, sides, mode="bicubic", antialias=True).clamp(0, 1)
        image, text = net.encode_image((resized - mean) / deviation), net.encode_text(tokenize(prompts))
        return 100 * torch.cosine_similarity(image, text).clamp(min=0)

    return score


def load_inception():
    """FID's features (b, 2048) of pictures (b, 3, H, W) in [0, 1]."""
    from pytorch_fid.inception import InceptionV3

    net = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    return torch.no_grad()(lambda pictures, _prompts: net(pictures)[0].flatten(1))


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """FID (arXiv 1706.08500) of features (n, D) and (m, D): |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2))."""
    x, y = x.double(), y.double()
    first, second = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross).item()
