"""Pixel fidelity of a picture against another, the nodes' own."""

from dha.fidelity import psnr, ssim

__all__ = ["psnr", "ssim"]
