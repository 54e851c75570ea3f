"""The Ray Serve application: one ingress that speaks HTTP, and for each model a deployment whose replicas
hold engines.

``build`` is what a Serve config file names (``import_path: labkit.serving.app:build``, ``args:
{deployments: [...]}``).
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from labkit.serving.api import build_api
from labkit.serving.backend import EngineBackend, Event, Job, State, Unavailable
from labkit.serving.deployment import INGRESS, Deployment, distinct_names, serve_name

# A replica is offered twice what its engine runs at once, so that a place in the batch never waits for
# the network.
OFFERED_PER_SLOT = 2


def build(args: dict[str, Any]) -> serve.Application:
    """The application for ``{"deployments": [{"checkpoint": ..., ...}, ...]}``; each is a Deployment's
    fields.

    Raises ValueError where there is none, a field is wrong, or two have the same name.
    """
    unknown = sorted(set(args) - {"deployments"})
    if unknown or not args.get("deployments"):
        raise ValueError(
            f"expected {{'deployments': [...]}} with at least one, found the keys {sorted(args)}"
        )
    deployments = [Deployment.model_validate(fields) for fields in args["deployments"]]
    names = distinct_names(deployment.name for deployment in deployments)
    return Ingress.bind([_model(deployment) for deployment in deployments], names)  # type: ignore[attr-defined]


def _model(deployment: Deployment) -> serve.Application:
    threads = deployment.threads or 1
    return Model.options(  # type: ignore[attr-defined]
        name=serve_name(deployment.name),
        num_replicas=deployment.replicas,
        max_ongoing_requests=OFFERED_PER_SLOT * deployment.max_batch,
        ray_actor_options={
            "num_cpus": threads,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        },
    ).bind(deployment.model_dump())


# An update of a running application starts the new replicas first, and only then ends the old ones; how long
# requests that still run there may take is what graceful_shutdown_timeout_s says. Short here, for a person who
# presses Ctrl-C; in a cluster the Serve config sets it.
UPDATE: dict[str, Any] = {
    "max_surge_percent": 100,
    "graceful_shutdown_timeout_s": 5,
    "graceful_shutdown_wait_loop_s": 0.5,
}


@serve.deployment(**UPDATE)
class Model:
    """A replica: the model in memory and an engine that runs it."""

    def __init__(self, fields: dict[str, Any]) -> None:
        import torch

        from labkit.models import load
        from labkit.serving.engine import Engine

        deployment = Deployment.model_validate(fields)
        torch.set_num_threads(deployment.threads or 1)
        model = load(deployment.checkpoint, seed=deployment.seed)
        engine = Engine(model, max_batch=deployment.max_batch, max_len=deployment.max_len)
        self._backend = EngineBackend(engine, deployment.name)

    async def generate(self, job: Job) -> AsyncGenerator[Event, None]:
        async for event in self._backend.generate(job):
            yield event

    async def states(self) -> list[State]:
        return await self._backend.states()

    def check_health(self) -> None:
        """Serve calls this; an engine whose thread has died means a new replica."""
        self._backend.check()

    def __del__(self) -> None:
        if hasattr(self, "_backend"):
            self._backend.engine.close()


class HandleBackend:
    """A model in other processes, reached through its Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any], name: str) -> None:
        self._handle, self.name, self.created = handle, name, int(time.time())
        self._stream = handle.options(method_name="generate", stream=True)

    async def generate(self, job: Job) -> AsyncGenerator[Event, None]:
        events: DeploymentResponseGenerator[Any] = self._stream.remote(job)  # type: ignore[assignment]
        finished = False
        try:
            async for event in events:
                yield event
            finished = True
        except (RayActorError, BackPressureError, DeploymentUnavailableError) as error:
            raise Unavailable(
                f"model {self.name!r} cannot answer now ({type(error).__name__}); try again"
            ) from error
        finally:
            if not finished:
                events.cancel()

    async def states(self) -> list[State]:
        found = await self._handle.broadcast("states").results_async()
        return [state for states in found for state in states]


@serve.deployment(name=INGRESS, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, **UPDATE)
@serve.ingress()
class Ingress:
    """Speaks HTTP for all models. It holds neither torch nor a model."""

    def __init__(self, handles: list[DeploymentHandle[Any]], names: list[str]) -> None:
        self._backends = [HandleBackend(handle, name) for handle, name in zip(handles, names, strict=True)]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._backends)
