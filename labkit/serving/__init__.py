"""A model behind a URL: scheduler, KV cache and engine; the OpenAI API; the Ray Serve application.

Names are looked up when they are asked for: the API's own process needs neither torch nor a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.serving.deployment import Deployment
    from labkit.serving.engine import Engine
    from labkit.serving.sampling import SamplingParams
    from labkit.serving.stream import Completion, Stream, Token

_HOMES = {
    "Completion": "stream",
    "Deployment": "deployment",
    "Engine": "engine",
    "SamplingParams": "sampling",
    "Stream": "stream",
    "Token": "stream",
}
__all__ = ["Completion", "Deployment", "Engine", "SamplingParams", "Stream", "Token"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'labkit.serving' has no attribute {name!r}")
    return getattr(import_module(f"labkit.serving.{_HOMES[name]}"), name)
