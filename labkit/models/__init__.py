"""A whole model: load it, transform it, calibrate, quantize, evaluate, save."""

from labkit.models import checkpoint, protocol
from labkit.models.calibrate import hessians
from labkit.models.checkpoint import checkpoint_for, save
from labkit.models.config import ModelConfig
from labkit.models.evaluate import Report, compare, evaluate, sizes
from labkit.models.fisher import fisher
from labkit.models.llama import Cache, GrowingCache, Linear, Llama, visible
from labkit.models.off_grid import off_grid
from labkit.models.protocol import Protocol, calibration_windows, protocol_for
from labkit.models.quantize import Made, quantize
from labkit.models.recipe import Calibration, Recipe, Rule
from labkit.models.store import load
from labkit.models.texts import Chapter, chapters
from labkit.models.tokenizer import Tokenizer, TokenStream

__all__ = [
    "Cache",
    "Calibration",
    "Chapter",
    "GrowingCache",
    "Linear",
    "Llama",
    "Made",
    "ModelConfig",
    "Protocol",
    "Recipe",
    "Report",
    "Rule",
    "TokenStream",
    "Tokenizer",
    "calibration_windows",
    "chapters",
    "checkpoint",
    "checkpoint_for",
    "compare",
    "evaluate",
    "fisher",
    "hessians",
    "load",
    "off_grid",
    "protocol",
    "protocol_for",
    "quantize",
    "save",
    "sizes",
    "visible",
]
