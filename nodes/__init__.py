"""The pack's nodes; everything ComfyUI learns from us, it learns when it calls `comfy_entrypoint`."""

from comfy_api.latest import ComfyExtension

from . import mini_sd21, model_folders
from .apply import ApplyDHA
from .compare import CompareModels, ComparePictures
from .load import LoadDHAStudent


class DHAExtension(ComfyExtension):
    async def get_node_list(self):
        return [LoadDHAStudent, ApplyDHA, CompareModels, ComparePictures]


async def comfy_entrypoint() -> DHAExtension:
    model_folders.register()
    mini_sd21.register()
    return DHAExtension()
