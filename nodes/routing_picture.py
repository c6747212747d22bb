"""A picture beside its routing map."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

SIDE = 384  # pixels that the longer side of a frame's halves has at least
BAR, GAP = 26, 6
KEPT, CHOSEN = (1.0, 0.55, 0.05), (0.75, 0.85, 1.0)
INK, PAPER = (235, 235, 235), (24, 24, 26)


def draw_frame(picture: torch.Tensor, kept: torch.Tensor, chosen: torch.Tensor, title: str) -> Image.Image:
    """Picture (H, W, 3) in 0..1 on the left; on the right in grey, with tokens (h, w) coloured by their share in 0..1.

    Of the tokens `kept` as keys those that a router has `chosen` (h, w) get a dot.
    """
    size = choose_size(*picture.shape[:2])
    enlarged = resize(picture, size)
    halves = [enlarged, colour_map(enlarged, kept, chosen)]
    height, width = size
    frame = Image.new("RGB", (2 * width + GAP, height + BAR), PAPER)
    for number, half in enumerate(halves):
        pixels = (half.clamp(0, 1) * 255).round().byte().numpy()
        frame.paste(Image.fromarray(pixels), (number * (width + GAP), BAR))
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(15)
    pen.text((6, 4), title, INK, font)
    legend = "orange: keys" + ("   dots: chosen by the router" if chosen.any() else "")
    pen.text((width + GAP + 6, 4), legend, INK, font)
    return frame


def choose_size(height: int, width: int) -> tuple[int, int]:
    """A whole multiple of the picture's size that can be looked at."""
    factor = max(1, -(-SIDE // max(height, width)))
    return height * factor, width * factor


def resize(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, 3) to another size."""
    return F.interpolate(picture.movedim(-1, 0)[None], size=size, mode="bicubic")[0].movedim(0, -1).clamp(0, 1)


def colour_map(picture: torch.Tensor, kept: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The picture (H, W, 3) in dark grey below coloured tokens (h, w)."""
    dim = picture.mean(-1, keepdim=True).expand_as(picture) * 0.55
    share = F.interpolate(kept[None, None], size=picture.shape[:2], mode="nearest-exact")[0, 0, ..., None]
    coloured = torch.lerp(dim, torch.tensor(KEPT).expand_as(dim), share.sqrt() * 0.9)
    return torch.lerp(coloured, torch.tensor(CHOSEN).expand_as(dim), spot((chosen > 0).float(), picture.shape[:2]))


def spot(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Opacity (H, W, 1) of a small dot in the middle of every token (h, w) that is 1."""
    down, across = (
        (torch.arange(pixels) + 0.5) * count / pixels % 1 - 0.5
        for pixels, count in zip(size, tokens.shape, strict=True)
    )
    distance = torch.hypot(down[:, None], across[None])
    whole = F.interpolate(tokens[None, None], size=size, mode="nearest-exact")[0, 0]
    return (whole * (distance < 0.16) * 0.8)[..., None]
