"""Notebook 20: a container image, from tar files upwards. What it asks, checks and draws."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from labkit.cluster.oci import Image, archive, open_image
from labkit.course import Exercise, Question, plot
from labkit.course.check import Wrong, require
from labkit.course.recorded import Steps
from labkit.settings import settings

Layer = dict[str, bytes]
Part = tuple[str, float, float]  # name, MB, changes in a month

# Names of files that hold passwords, tokens or keys more often than not.
SECRETS = re.compile(
    r"(^|/)(\.env|\.netrc|\.pypirc|\.git-credentials|id_(rsa|ed25519)|\.docker/config\.json)$"
)

# What a server does until it can answer: run in a process of its own, as in a new container. Processor time, so that
# what else the machine does is not counted.
START_UP = """
import json, sys, time
stages, last = {}, 0.0
def stage(name):
    global last
    now = time.process_time()
    stages[name], last = now - last, now
stage("Python itself")
import torch
stage("import torch")
from labkit.models import load
from labkit.serving.engine import Engine
stage("import labkit")
model = load(sys.argv[1])
stage("load the checkpoint")
with Engine(model, max_batch=1, max_len=64) as engine:
    next(iter(engine.submit("Call me")))
    stage("first token")
    print(json.dumps(stages))
"""


# --- the image that `make image` built ---


def start() -> Steps[Image]:
    """The notebook's live steps: they read the server's image where it was built on this machine."""
    return Steps("20", _image, _versions)


def _image() -> Image:
    layout = settings().node / "images" / "oci"
    try:
        return open_image(layout, "server:dev")
    except FileNotFoundError as error:
        raise RuntimeError("the server's image was not built here (`make image`)") from error


def _versions(image: Image) -> dict[str, str]:
    labels = image.config["config"].get("Labels") or {}
    return {"the image": labels.get("org.opencontainers.image.revision") or image.digest[7:19]}


def start_up(checkpoint: Path) -> dict[str, dict[str, float]]:
    """Seconds of one core for each stage from the start of a process to its first token, twice: with compiled modules,
    and as where Python finds none and may not keep what it compiles.
    """
    with tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as empty:
        _stages(checkpoint, {"PYTHONPYCACHEPREFIX": kept, "PYTHONDONTWRITEBYTECODE": ""})  # compiles
        return {
            "compiled": _stages(checkpoint, {"PYTHONPYCACHEPREFIX": kept}),
            "not compiled": _stages(
                checkpoint, {"PYTHONPYCACHEPREFIX": empty, "PYTHONDONTWRITEBYTECODE": "1"}
            ),
        }


def _stages(checkpoint: Path, environment: Mapping[str, str]) -> dict[str, float]:
    command = [sys.executable, "-c", START_UP, str(checkpoint)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    stages: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return stages


# --- exercises ---


def visible(layers: Sequence[Layer]) -> Layer:
    """What a container sees of these layers, the lowest first: path to content."""
    seen: Layer = {}
    for layer in layers:
        for path in layer:
            folder, slash, name = path.rpartition("/")
            if name == ".wh..wh..opq":
                gone = folder + slash
                seen = {p: c for p, c in seen.items() if not p.startswith(gone)}
            elif name.startswith(".wh."):
                gone = folder + slash + name.removeprefix(".wh.")
                seen = {p: c for p, c in seen.items() if p != gone and not p.startswith(gone + "/")}
        seen |= {p: c for p, c in layer.items() if not p.rpartition("/")[2].startswith(".wh.")}
    return seen


_VIEWS: list[tuple[str, list[Layer]]] = [
    (
        "Two layers have the same path: the upper one counts",
        [{"app/a.py": b"old", "app/b.py": b"b"}, {"app/a.py": b"new"}],
    ),
    (
        "A whiteout is an instruction, not a file: what it names is gone, and the whiteout is not there either",
        [{"home/.netrc": b"secret", "home/notes": b"n"}, {"home/.wh.notes": b""}],
    ),
    (
        "A whiteout of a folder takes away all that lies in it",
        [{"src/lib/x.c": b"x", "src/lib/deep/y.c": b"y", "src/main.c": b"m"}, {"src/.wh.lib": b""}],
    ),
    (
        "`.wh.lib` takes away `lib`, and not `lib64`, which only begins with the same letters",
        [{"usr/lib/x": b"x", "usr/lib64/y": b"y", "usr/libx": b"z"}, {"usr/.wh.lib": b""}],
    ),
    (
        "A whiteout hides what lies below; what its own layer brings stays, wherever it stands in the layer",
        [{"opt/old/a": b"a"}, {"opt/old/b": b"b", "opt/.wh.old": b""}],
    ),
    (
        "`.wh..wh..opq` empties its folder, and leaves what its own layer puts there",
        [
            {"cache/a": b"a", "cache/in/b": b"b", "cached": b"c"},
            {"cache/d": b"d", "cache/.wh..wh..opq": b""},
        ],
    ),
    (
        "What was taken away may come back in a layer further up",
        [{"a": b"1", "b": b"1"}, {".wh.a": b"", ".wh.b": b""}, {"a": b"2"}],
    ),
]


def _check_visible(fn):  # type: ignore[no-untyped-def]
    for rule, layers in _VIEWS:
        right = visible(layers)
        try:
            found = fn(layers)
        except Wrong as wrong:
            raise Wrong(f"{rule}. {wrong}") from wrong
        require(
            isinstance(found, Mapping),
            f"return a dict of path to content; this is a {type(found).__name__}",
        )
        extra, missing = sorted(set(found) - set(right)), sorted(set(right) - set(found))
        require(not extra, f"{rule}. Your container sees {', '.join(extra)}, which it should not.")
        require(not missing, f"{rule}. Your container lacks {', '.join(missing)}.")
        other = [path for path in right if bytes(found[path]) != right[path]]
        require(not other, f"{rule}. You have {found[other[0]]!r} in {other[0]}." if other else "")


def hidden(image: bytes) -> list[tuple[int, str]]:
    """Files that lie in the image and that no container sees: (number of the layer, path), in order."""

    def files(blob: bytes) -> Layer:
        with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
            return {entry.name: b"".join(tar.extractfile(entry) or ()) for entry in tar}

    held = {name.replace("/", ":"): blob for name, blob in files(image).items()}
    [entry] = json.loads(held["index.json"])["manifests"]
    manifest = json.loads(held["blobs:" + entry["digest"]])
    layers = [files(held["blobs:" + entry["digest"]]) for entry in manifest["layers"]]
    found = []
    for number, layer in enumerate(layers):
        for path in layer:
            above = [{path: b"here"}, *({p: b"" for p in upper} for upper in layers[number + 1 :])]
            if "/.wh." not in f"/{path}" and visible(above).get(path) != b"here":
                found.append((number, path))
    return found


def _check_hidden(fn):  # type: ignore[no-untyped-def]
    cases: list[tuple[str, list[Layer]]] = [
        (
            "A file that an upper layer takes away still lies in its own layer",
            [{"etc/os": b"d"}, {"home/.netrc": b"s", "home/a": b"a"}, {"b": b"b"}, {"home/.wh..netrc": b""}],
        ),
        (
            "A file that an upper layer replaces is hidden as well, even where the new one is the same",
            [{"app/settings": b"password", "app/x": b"x"}, {"app/settings": b"none"}, {"app/x": b"x"}],
        ),
        (
            "A whiteout of a folder hides each file in it",
            [{"src/a": b"a", "src/in/b": b"b"}, {".wh.src": b""}, {"src/a": b"a"}],
        ),
        ("Nothing is hidden in an image of one layer", [{"a": b"a", "b": b"b"}]),
    ]  # fmt: skip
    for rule, layers in cases:
        image = archive(layers)
        right = hidden(image)
        try:
            found = fn(image)
        except Wrong as wrong:
            raise Wrong(f"{rule}. {wrong}") from wrong
        require(
            isinstance(found, list | tuple | set) and all(len(each) == 2 for each in found),
            "return a list of pairs: the layer's number and the path",
        )
        pairs = sorted((int(number), str(path)) for number, path in found)
        markers = [path for _, path in pairs if "/.wh." in f"/{path}"]
        require(not markers, "whiteouts are instructions, not files: leave them out")
        counted = [(number - 1, path) for number, path in pairs]
        require(not right or counted != right, "count the layers from 0: the lowest one is layer 0")
        paths = sorted({path for _, path in right})
        if pairs != sorted(right) and sorted({path for _, path in pairs}) == paths:
            raise Wrong(f"{rule}. The paths are right, the layers are not: say where the file lies.")
        require(pairs == sorted(right), f"{rule}. You found {pairs}; expected {sorted(right)}.")


def monthly(parts: Sequence[Part]) -> float:
    """MB that one node fetches in a month, when a change to a layer means fetching it and all above it."""
    return sum(rate * sum(size for _, size, _ in parts[i:]) for i, (_, _, rate) in enumerate(parts))


def order(parts: list[Part]) -> list[Part]:
    """The parts, lowest layer first, so that a month of changes fetches least."""
    return sorted(parts, key=lambda part: part[2] / part[1])


def _check_order(fn):  # type: ignore[no-untyped-def]
    cases: list[list[Part]] = [
        [("code", 3, 30), ("environment", 2500, 1), ("model", 540, 2), ("system", 150, 0.5)],
        [("code", 1, 20), ("texts", 4, 25), ("environment", 900, 3)],
        [("large", 1000, 8), ("small", 10, 4), ("middle", 200, 6)],
        [("a", 100, 4), ("b", 50, 2), ("c", 25, 1)],  # all the same
    ]
    for parts in cases:
        found = fn(parts)
        require(
            isinstance(found, list | tuple) and sorted(map(tuple, found)) == sorted(parts),
            "return the same parts, each once, in another order",
        )
        found = [(str(name), float(size), float(rate)) for name, size, rate in found]
        best = min(monthly(each) for each in permutations(parts))
        cost = monthly(found)
        if cost <= best * (1 + 1e-9):
            continue
        names = " < ".join(name for name, _, _ in found)
        tail = f": {names} fetches {cost:,.0f} MB a month; {best:,.0f} MB would do"
        key = {
            "this is the wrong way round: the first part of the list is the lowest layer": order(parts)[
                ::-1
            ],
            "rarely changed first is nearly it, but a large layer may change more often and still belong below "
            "a small one": sorted(parts, key=lambda part: part[2]),
            "size alone does not decide: what changes often belongs above": sorted(
                parts, key=lambda part: -part[1]
            ),
            "small layers first is the worst of both": sorted(parts, key=lambda part: part[1]),
            "you weigh changes times size; try changes for each MB": sorted(
                parts, key=lambda part: part[1] * part[2]
            ),
        }
        for sentence, made in key.items():
            if [name for name, _, _ in made] == [name for name, _, _ in found]:
                raise Wrong(sentence + tail)
        raise Wrong("there is a better order" + tail)


EXERCISES = [
    Exercise(
        "20.1",
        "What a container sees",
        difficulty=2,
        minutes=15,
        statement="""
            `layers` are the layers of an image, the lowest first; each is a dict of path to content. Return what a
            container sees, as one such dict:

            - of two files with the same path, the one in the upper layer;
            - `home/.wh.notes`, a **whiteout**, takes `home/notes` away: the file, or the folder with all in it;
            - `home/.wh..wh..opq` takes away all that lies in `home/`;
            - whiteouts act on the layers below, not on their own layer, and are not seen themselves.
        """,
        starter='''
            def my_visible(layers: list[dict[str, bytes]]) -> dict[str, bytes]:
                """What a container sees: path to content."""
                raise NotImplementedError
        ''',
        solution=visible,
        check=_check_visible,
        hints=[
            "Go up layer by layer with one dict `seen`. For each layer, first take away, then add.",
            "`folder, slash, name = path.rpartition('/')` takes a path apart; `name.startswith('.wh.')` is a whiteout.",
            "Gone is the path itself, and each path that starts with it and a `/`.",
        ],
    ),
    Exercise(
        "20.2",
        "What lies in an image and is not seen",
        difficulty=3,
        minutes=20,
        statement="""
            `image` holds the bytes of an OCI archive, as you have just read one. Return each file that lies in one of
            its layers and that no container sees, because an upper layer takes it away or replaces it: a list of
            (number of the layer, path), the lowest layer being 0. Whiteouts are no files.
        """,
        starter='''
            def my_hidden(image: bytes) -> list[tuple[int, str]]:
                """(layer, path) of each file that lies in the image and that no container sees."""
                raise NotImplementedError
        ''',
        solution=hidden,
        check=_check_hidden,
        hints=[
            "`layers_of(image)` from the cell above gives you the layers as dicts.",
            "Is a file of layer 2 hidden? Ask `visible` about that file alone, with the layers above it.",
            "Mark the file with a content of its own, so that you can tell it from one that replaced it.",
        ],
    ),
    Exercise(
        "20.3",
        "The order of layers",
        difficulty=2,
        minutes=10,
        statement="""
            Each part of an image has a name, a size $s$ in MB and a number of changes in a month, $r$. When part $i$
            changes, it is fetched again together with all that lies above it. In a month this comes to

            $$\\sum_i r_i \\sum_{j \\ge i} s_j.$$

            Return the parts in the order, lowest first, that makes this least. (Suppose that each part could be built
            below each other one.)
        """,
        starter='''
            def my_order(parts: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
                """The parts (name, MB, changes in a month), lowest layer first, so that least is fetched."""
                raise NotImplementedError
        ''',
        solution=order,
        check=_check_order,
        hints=[
            "Take two neighbours only. What does each order cost, and when is one better than the other?",
            "With $a$ below $b$ the pair costs $r_a (s_a + s_b) + r_b s_b$. Swap the letters and compare.",
            "$a$ belongs below where $r_a s_b < r_b s_a$, which is $r_a / s_a < r_b / s_b$: sort by that.",
        ],
    ),
]

QUIZ = [
    Question(
        "A Containerfile copies a password file in one line and removes it in the next. What about the password?",
        {
            "It is gone: no container sees the file": "No container sees it, but its layer is in the image.",
            "Whoever can pull the image can read it": "The layer with the file is pulled like any other.",
            "It is encrypted by its digest": "A digest is a name. It hides nothing.",
        },
        answer="b",
    ),
    Question(
        "You correct a comment in your code, which is the top layer. What does a node fetch that had the old image?",
        {
            "The top layer and two small JSON files": "All other blobs have the digests that it knows.",
            "The whole image": "Blobs whose digest it has are not fetched again.",
            "Nothing, comments do not matter": "Another byte is another digest.",
        },
        answer="a",
    ),
    Question(
        "Twenty models of 15 GB, each replaced twice a week, served by the same code. Where do the weights go?",
        {
            "Into the image, as its lowest layer": "Every model would be fetched again with each change of another.",
            "Into the image, as its top layer": "It would be twenty images, built anew twice a week each.",
            "Outside, on a volume": "Code and weights then change, and are fetched, each at its own time.",
        },
        answer="c",
    ),
]


# --- pictures ---


def short(made_by: str) -> str:
    """An instruction of a Containerfile in a few words."""
    words = re.sub(r"^(/bin/sh -c )?(#\(nop\) )?", "", made_by).split(" # buildkit")[0]
    for sign, name in _NAMES.items():
        if sign in words:
            return name
    return "Debian" if words in ("", "/bin/sh", "bash") else words[:28] + "…" * (len(words) > 28)


_NAMES = {
    "debootstrap": "Debian",
    "apt-get": "tools and the user",
    "COPY file": "list of packages",
    "requirements": "Python packages",
    "/opt/cache": "the model",
    "/opt/lab": "labkit",
}


def layer_figure(layers: Sequence[Mapping[str, Any]]) -> go.Figure:
    """The layers of an image, the lowest at the bottom, by size."""
    total = sum(layer["MB"] for layer in layers)
    largest = max(layers, key=lambda layer: layer["MB"])
    figure = plot.figure(
        f"{largest['MB'] / total:.0%} of {total / 1000:.1f} GB is one layer: {largest['name']}",
        "size (MB, not compressed)",
        "",
        height=120 + 34 * len(layers),
    )
    figure.add_bar(
        x=[layer["MB"] for layer in layers],
        y=[f"{number} {layer['name']}" for number, layer in enumerate(layers)],
        orientation="h",
        text=[f"{layer['MB']:,.1f}" for layer in layers],
        textposition="outside",
        cliponaxis=False,
        marker_color=plot.BLUE,
    )
    return figure.update_xaxes(range=[0, 1.15 * largest["MB"]])


def start_up_figure(runs: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Where the time goes from the start of a process to its first token, in each of two runs."""
    totals = [sum(stages.values()) for stages in runs.values()]
    figure = plot.figure(
        f"{totals[0]:.1f} s of work to the first token, {totals[-1]:.1f} s without compiled modules",
        "",
        "processor time (s)",
    )
    for (name, stages), color in zip(runs.items(), (plot.BLUE, plot.ORANGE), strict=True):
        figure.add_bar(
            x=list(stages),
            y=[round(seconds, 2) for seconds in stages.values()],
            name=f"modules {name}",
            text=[f"{seconds:.1f}" for seconds in stages.values()],
            textposition="outside",
            cliponaxis=False,
            marker_color=color,
        )
    return figure.update_layout(barmode="group", legend={"x": 0.99, "xanchor": "right", "y": 0.99})


class Change:
    """The widget's function: what a change to one part costs each node, for two orders of the layers."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self.__name__ = "change"

    def __call__(self, changed: str = "labkit", order: str = "as built", megabits: int = 200) -> go.Figure:
        parts = self.parts if order == "as built" else self.parts[::-1]
        at = [name for name, _, _ in parts].index(changed)
        fetched = sum(size for _, size, _ in parts[at:])
        seconds = fetched * 8 / megabits
        figure = plot.figure(
            f"{changed} changes: each node fetches {fetched:,.0f} MB, {_time(seconds)} at {megabits} Mbit/s",
            "size (MB)",
            "",
            height=150 + 34 * len(parts),
        )
        for name, color, chosen in (
            ("kept", plot.SKY, parts[:at]),
            ("fetched again", plot.RED, parts[at:]),
        ):
            figure.add_bar(
                x=[max(size, 1) for _, size, _ in chosen],
                y=[part for part, _, _ in chosen],
                orientation="h",
                name=name,
                marker_color=color,
                text=[name] * len(chosen),
                textposition="auto",
            )
        figure.update_yaxes(categoryorder="array", categoryarray=[name for name, _, _ in parts])
        return figure.update_layout(barmode="overlay", legend={"x": 0.99, "xanchor": "right", "y": 0.5})


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
