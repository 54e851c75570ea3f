"""One checkpoint takes another's place while requests flow, the way a cluster does it: Serve's own deploy call takes
the Serve config of the manifests.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from server import READY_S, until

from labkit import models
from labkit.cluster.local import ray_session, reserve
from labkit.cluster.render import serve_config
from labkit.serving import Deployment
from labkit.serving.deployment import APP_NAME

TOKENS = [800, 4, 4]  # of each client's answers: whenever a replica is ended, a long one is on its way


class Load:
    """Clients that ask for the alias, one request after the other, the last without streaming."""

    def __init__(self, url: str) -> None:
        self.url, self.stop = url, threading.Event()
        self.names: list[str] = []  # that answered
        self.failed: list[str] = []

    def run(self, number: int) -> None:
        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)
        ask = {"model": "lab", "prompt": "Call me", "max_tokens": TOKENS[number]}
        while not self.stop.is_set():
            try:
                if number < len(TOKENS) - 1:
                    chunks = list(client.completions.create(**ask, stream=True))
                    [name] = {chunk.model for chunk in chunks}
                    assert chunks[-1].choices[0].finish_reason is not None, "cut short"
                else:
                    name = client.completions.create(**ask).model
                self.names.append(name)
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")

    def answered(self, name: str) -> int:
        return self.names.count(name)

    def wait_for(self, name: str, count: int) -> None:
        """Until so many answers came from it; meanwhile each Serve deployment keeps a replica that runs."""
        deadline = time.monotonic() + 180
        while self.answered(name) < count:
            assert time.monotonic() < deadline, (Counter(self.names), self.failed[:3])
            for deployment in serve.status().applications[APP_NAME].deployments.values():
                assert deployment.replica_states.get("RUNNING", 0) >= 1, deployment
            time.sleep(0.1)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    number, lock = reserve()
    os.environ["OMP_NUM_THREADS"] = "1"
    with lock, ray_session(cores=4):
        serve.start(http_options={"host": "127.0.0.1", "port": number})
        yield number
        serve.shutdown()


def apply(port: int, deployment: Deployment) -> None:
    config = serve_config([deployment])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)


def test_from_one_checkpoint_to_the_other_and_back_no_request_is_lost(port: int, tmp_path: Path) -> None:
    recipe = models.Recipe.parse("name: r\nrules: [{match: '*', weight: int4 g32 asym, method: rtn}]")
    folder = models.save(models.quantize(models.load("tiny"), recipe), tmp_path / "int4")
    fp32 = Deployment(checkpoint="tiny", name="lab@fp32", threads=1, max_len=1024)
    int4 = Deployment(checkpoint=str(folder), name="lab@int4", threads=1, max_len=1024)
    server = f"http://127.0.0.1:{port}"

    apply(port, fp32)
    until(lambda: httpx.get(f"{server}/healthz", timeout=30).status_code == 200, READY_S)
    load = Load(f"{server}/v1")
    with ThreadPoolExecutor(len(TOKENS)) as pool:
        clients = [pool.submit(load.run, number) for number in range(len(TOKENS))]
        try:
            load.wait_for("lab@fp32", 20)
            apply(port, int4)
            load.wait_for("lab@int4", 100)
            before = load.answered("lab@fp32")
            apply(port, fp32)
            load.wait_for("lab@fp32", before + 100)
        finally:
            load.stop.set()
        for client in clients:
            client.result()
    assert load.failed == []
    listed = httpx.get(f"{server}/v1/models", timeout=5).json()
    assert [card["id"] for card in listed["data"]] == ["lab@fp32"]
