"""Lets a torchvision whose compiled part cannot be loaded be imported; Python runs this file where it is on PYTHONPATH.

torchvision's wheels for Linux are linked to CUDA. Beside a torch without CUDA their operators stay undeclared, and
`torchvision._meta_registrations`, which describes two of them, fails. Their schemas are all that it needs. The
operators themselves still raise when they are called; transforms and models do not call them.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclaringLoader(SourceFileLoader):
    """Declares the schemas before the module runs, where torchvision itself found no operators."""

    def exec_module(self, module):
        import torch
        from torchvision.extension import _has_ops

        if not _has_ops():
            # Kept on the module: the schemas are withdrawn when the library object goes.
            module.declared = torch.library.Library("torchvision", "DEF")
            for schema in SCHEMAS:
                module.declared.define(schema)
        super().exec_module(module)


class RegistrationsFinder(MetaPathFinder):
    """Finds one module only."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision._meta_registrations":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin:
            spec.loader = DeclaringLoader(name, spec.origin)
        return spec


sys.meta_path.insert(0, RegistrationsFinder())
