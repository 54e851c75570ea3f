"""The transforms by name, as recipes call them: each changes weights and keeps the function of the model.

``transform(model, stats=None, **options)`` changes ``model`` in place and returns it. A new transform is one
file and one line here; ``transform.needs`` is not empty where it cannot do without ``stats``.
"""

from __future__ import annotations

from collections.abc import Callable

from labkit.models.awq import awq_scale
from labkit.models.llama import Llama
from labkit.models.rotate import rotate

Transform = Callable[..., Llama]
TRANSFORMS: dict[str, Transform] = {"awq_scale": awq_scale, "rotate": rotate}
