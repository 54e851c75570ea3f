"""What is to be served, as plain data: the same object runs on local Ray and is rendered for Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from labkit.settings import DEFAULT_MODEL

APP_NAME, INGRESS = "labkit", "Ingress"
TINY = "tiny"
ON_A_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Deployment(BaseModel):
    """One model behind one name. JSON there and back: ``model_dump_json()`` and
    ``Deployment.model_validate_json()``.

    checkpoint  what ``labkit.models.load`` takes: a folder, a name, ``org/name``
    name        what a request says in ``model``; default: the folder's or the model's last name. Of a name such as
                ``lab@int4`` a request may say the part before the @ alone, its alias: that stays when the
                checkpoint behind it changes
    replicas    engines, each with the whole model
    threads     CPU threads, and cores reserved, for each replica; None = the machine's cores shared out
                among them
    max_batch   requests that one engine runs at once
    max_len     tokens that prompt and answer may have together
    engine      "labkit": this project's own
    seed        the off-grid factors of the bundled model; a checkpoint made by ``labkit quantize``
                carries its own

    Raises pydantic's ValidationError, which is a ValueError, for a field that does not exist or a value
    out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    name: str = Field("", max_length=200, pattern="^[^@]")
    replicas: int = Field(1, ge=1)
    threads: int | None = Field(None, ge=1)
    max_batch: int = Field(8, ge=1)
    max_len: int = Field(2048, ge=2)
    engine: Literal["labkit"] = "labkit"
    seed: int | None = 0

    @model_validator(mode="before")
    @classmethod
    def _name_from_checkpoint(cls, fields: object) -> object:
        if isinstance(fields, dict):
            fields = dict(fields)
            if isinstance(fields.get("checkpoint"), Path):
                fields["checkpoint"] = str(fields["checkpoint"])
            if not fields.get("name") and isinstance(fields.get("checkpoint"), str):
                fields["name"] = Path(fields["checkpoint"]).expanduser().name
        return fields

    def check(self) -> None:
        """See that the checkpoint can be one, before anything slow is started. What ``org/name`` of a hub
        has is left to ``load``.

        Raises FileNotFoundError that says what is missing.
        """
        path = Path(self.checkpoint).expanduser()
        if path.is_dir():
            if not (path / "config.json").exists() or not any(path.glob("*.safetensors")):
                raise FileNotFoundError(
                    f"{path} lacks config.json or *.safetensors: expected a checkpoint made by `labkit "
                    "quantize` or a model in Hugging Face layout"
                )
        elif path.exists() or not (
            self.checkpoint in (TINY, DEFAULT_MODEL) or ON_A_HUB.fullmatch(self.checkpoint)
        ):
            raise FileNotFoundError(
                f"checkpoint {self.checkpoint!r} is not a folder; make one with `labkit quantize --out "
                f"{self.checkpoint}`, or give the name of a model (`labkit models list`)"
            )


def alias(name: str) -> str:
    """What stands before the @, or the whole name: what clients ask for, whichever checkpoint is behind it."""
    return name.partition("@")[0]


def is_called(name: str, asked: str) -> bool:
    """Whether a request that asks for this may be answered by the model of that name."""
    return asked in (name, alias(name))


def serve_name(name: str) -> str:
    """What Ray Serve calls the model of that name. The alias decides, so that another checkpoint under the same
    alias is an update of what runs, replica by replica, and not an end and a beginning.
    """
    return "model-" + re.sub(r"[^A-Za-z0-9-]", "-", alias(name))


def distinct_names(names: Iterable[str]) -> list[str]:
    """The names, in order. Raises ValueError where a request, or Ray Serve, could mean two."""
    names = list(names)
    if len({serve_name(name) for name in names}) < len(names):
        raise ValueError(
            f"every model needs its own name, found {names}; set `name` on one of those that are equal (the "
            "letters, digits and - before an @ count)"
        )
    return names
