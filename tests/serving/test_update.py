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

from labkit import models
from labkit.cluster.local import ray_session, reserve
from labkit.cluster.render import serve_config
from labkit.serving import Deployment

CLIENTS = 3
LONG = 400  # tokens of the answer that an update must not cut


class Load:
    """Clients that ask for the alias, one request after the other, half of them streaming."""

    def __init__(self, url: str) -> None:
        self.url, self.stop = url, threading.Event()
        self.names: list[str] = []  # that answered
        self.failed: list[str] = []

    def run(self, number: int) -> None:
        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)
        while not self.stop.is_set():
            try:
                if number % 2:
                    name = client.completions.create(model="lab", prompt="Call me", max_tokens=4).model
                else:
                    chunks = list(
                        client.completions.create(model="lab", prompt="Call me", max_tokens=4, stream=True)
                    )
                    [name] = {chunk.model for chunk in chunks}
                    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
                self.names.append(name)
            except Exception as error:
                self.failed.append(f"{type(error).__name__}: {error}")

    def answered(self, name: str) -> int:
        return self.names.count(name)

    def wait_for(self, name: str, count: int) -> None:
        deadline = time.monotonic() + 180
        while self.answered(name) < count:
            assert time.monotonic() < deadline, (Counter(self.names), self.failed[:3])
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


def long_answer(url: str) -> list[str]:
    """Its model, tokens and reason. A failure to the end is an exception."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=180)
    chunks = list(
        client.completions.create(
            model="lab",
            prompt="Call me",
            max_tokens=LONG,
            stream=True,
            temperature=0,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].usage is not None
    return [chunks[0].model, str(chunks[-1].usage.completion_tokens), chunks[-2].choices[0].finish_reason]


def test_from_one_checkpoint_to_the_other_and_back_no_request_is_lost(port: int, tmp_path: Path) -> None:
    recipe = models.Recipe.parse("name: r\nrules: [{match: '*', weight: int4 g32 asym, method: rtn}]")
    folder = models.save(models.quantize(models.load("tiny"), recipe), tmp_path / "int4")
    fp32 = Deployment(checkpoint="tiny", name="lab@fp32", threads=1, max_len=512)
    int4 = Deployment(checkpoint=str(folder), name="lab@int4", threads=1, max_len=512)
    url = f"http://127.0.0.1:{port}/v1"

    apply(port, fp32)
    deadline = time.monotonic() + 120
    while True:
        try:
            httpx.get(f"{url}/models", timeout=5).raise_for_status()
            break
        except httpx.HTTPError:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    load = Load(url)
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(load.run, number) for number in range(CLIENTS)]
        try:
            load.wait_for("lab@fp32", 20)
            stream = pool.submit(long_answer, url)
            apply(port, int4)
            load.wait_for("lab@int4", 100)
            assert stream.result() == ["lab@fp32", str(LONG), "length"]
            before = load.answered("lab@fp32")
            apply(port, fp32)
            load.wait_for("lab@fp32", before + 100)
        finally:
            load.stop.set()
        for client in clients:
            client.result()
    assert load.failed == []
    listed = httpx.get(f"{url}/models", timeout=5).json()
    assert [card["id"] for card in listed["data"]] == ["lab@fp32"]
