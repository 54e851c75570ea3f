"""The checkpoint a notebook goes on with: the learner's own where they made one."""

from __future__ import annotations

from pathlib import Path

from labkit.course.workspace import work


def checkpoint(recipe: str) -> Path:
    """A folder with the model quantized by ``recipe``, ready for ``labkit.models.load`` and ``labkit serve``.

    ``work/checkpoints/RECIPE`` where the learner made one (notebook 06 does); otherwise the lab's, made
    once in the cache.
    """
    own = work() / "checkpoints" / recipe
    if own.is_dir():
        return own
    from labkit.models import checkpoint_for

    return Path(checkpoint_for(recipe))
