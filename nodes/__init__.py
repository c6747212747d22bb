"""The pack's nodes; everything ComfyUI learns from us, it learns when it calls `comfy_entrypoint`."""

from comfy_api.latest import ComfyExtension

from . import mini_sd21, model_folders
from .apply import ApplyDHA
from .benchmark import Benchmark
from .compare import CompareModels
from .compare_pictures import ComparePictures
from .control import ApplyFrequencyControl, LoadFrequencyControl
from .frequency import FrequencyFilter
from .load import LoadDHAStudent
from .measure_layers import MeasureLayers
from .routing_map import RoutingMap
from .save_report import SaveReport
from .train import DKDTrain
from .training_record import TrainingRecord

WEB_DIRECTORY = "./web"  # what the browser gets, seen from the root


class DHAExtension(ComfyExtension):
    async def get_node_list(self):
        control = [FrequencyFilter, LoadFrequencyControl, ApplyFrequencyControl]
        compare = [CompareModels, ComparePictures, Benchmark, RoutingMap, SaveReport]
        return [LoadDHAStudent, ApplyDHA, MeasureLayers, DKDTrain, TrainingRecord, *compare, *control]


async def comfy_entrypoint() -> DHAExtension:
    model_folders.register()
    mini_sd21.register()
    return DHAExtension()
