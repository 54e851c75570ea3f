"""A whole model: load it, transform it, calibrate, quantize, evaluate, save."""

from labkit.models import checkpoint, protocol
from labkit.models.allocate import Cost, Sensitivity, allocate, measure
from labkit.models.awq import awq_scale
from labkit.models.calibrate import ModelStats, hessians
from labkit.models.checkpoint import checkpoint_for, save
from labkit.models.choices import Choices, choices, confidence, pick
from labkit.models.config import ModelConfig
from labkit.models.evaluate import Report, compare, evaluate, sizes
from labkit.models.fisher import fisher
from labkit.models.kv import KVSpec
from labkit.models.llama import Cache, GrowingCache, Linear, Llama, visible
from labkit.models.off_grid import off_grid
from labkit.models.protocol import Protocol, calibration_windows, protocol_for
from labkit.models.quantize import Made, peak_bytes, quantize
from labkit.models.recipe import Calibration, Recipe, Rule, Training, Transform
from labkit.models.rotate import RotationWarning, online, rotate
from labkit.models.store import load
from labkit.models.texts import Chapter, chapters
from labkit.models.tokenizer import Tokenizer, TokenStream
from labkit.models.train import train, train_bytes, training_batches
from labkit.models.transforms import TRANSFORMS
from labkit.models.unfinished import unfinished_folder

__all__ = [
    "TRANSFORMS",
    "Cache",
    "Calibration",
    "Chapter",
    "Choices",
    "Cost",
    "GrowingCache",
    "KVSpec",
    "Linear",
    "Llama",
    "Made",
    "ModelConfig",
    "ModelStats",
    "Protocol",
    "Recipe",
    "Report",
    "RotationWarning",
    "Rule",
    "Sensitivity",
    "TokenStream",
    "Tokenizer",
    "Training",
    "Transform",
    "allocate",
    "awq_scale",
    "calibration_windows",
    "chapters",
    "checkpoint",
    "checkpoint_for",
    "choices",
    "compare",
    "confidence",
    "evaluate",
    "fisher",
    "hessians",
    "load",
    "measure",
    "off_grid",
    "online",
    "peak_bytes",
    "pick",
    "protocol",
    "protocol_for",
    "quantize",
    "rotate",
    "save",
    "sizes",
    "train",
    "train_bytes",
    "training_batches",
    "unfinished_folder",
    "visible",
]
