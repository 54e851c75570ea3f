"""A whole model: load it, transform it, calibrate, quantize, evaluate, save."""

from labkit.models.config import ModelConfig
from labkit.models.llama import Cache, GrowingCache, Linear, Llama, visible
from labkit.models.off_grid import off_grid
from labkit.models.store import load
from labkit.models.texts import Chapter, chapters
from labkit.models.tokenizer import Tokenizer, TokenStream

__all__ = [
    "Cache",
    "Chapter",
    "GrowingCache",
    "Linear",
    "Llama",
    "ModelConfig",
    "TokenStream",
    "Tokenizer",
    "chapters",
    "load",
    "off_grid",
    "visible",
]
