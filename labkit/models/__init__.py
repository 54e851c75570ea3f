"""A whole model: load it, transform it, calibrate, quantize, evaluate, save."""

from labkit.models.config import ModelConfig
from labkit.models.llama import Cache, GrowingCache, Linear, Llama, visible
from labkit.models.off_grid import off_grid
from labkit.models.store import load
from labkit.models.tokenizer import Tokenizer

__all__ = ["Cache", "GrowingCache", "Linear", "Llama", "ModelConfig", "Tokenizer", "load", "off_grid", "visible"]
