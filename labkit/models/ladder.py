"""The ladder: many recipes measured on one model over several seeds, and compared within a seed.

A seed draws the off-grid factors and the calibration windows anew; the evaluation windows never change. So two
recipes of one seed have everything in common but the recipe, and their difference is far less noisy than
either figure.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from labkit.files import whole_file
from labkit.models.evaluate import compare_each
from labkit.models.llama import Llama
from labkit.models.quantize import quantize
from labkit.models.store import load

SEEDS = (0, 1, 2)
BASELINE = "w{bits}a16-rtn-g64"  # what every recipe of as many bits is compared with
# The ablation: each Hessian from the unquantized model. Its name is a recipe's with this at its end.
ABLATED = ", propagate=False"
LADDER = (
    "w8a16-rtn-channel",
    *(
        f"w{bits}a16-{method}"
        for bits in (4, 3)
        for method in (
            "rtn-g64",
            "gptq-g64",
            "gptq-g64-actorder",
            "awq-g64",
            "hqq-g64",
            "rotate-rtn-g64",
            "rotate-gptq-g64",
            "kmeans-g64",
            "quantile-g64",
            "squeezellm-g64",
            "rtn-channel",
            "gptq-channel",
        )
    ),
    "w3a16-squeezellm-channel",
    "w4a16-nf4-b64",
    "w4a16-mxfp4-g32",
    "w4a16-nvfp4-g16",
    "w2a16-rtn-g64",
    "w2a16-gptq-g64",
    "w4a16-gptq-g64" + ABLATED,
    "w3a16-adaround-g64",
)
# What conclusions are drawn from is measured with every seed, the rest of the ladder with the first alone.
EVERY_SEED = frozenset(
    {
        "w8a16-rtn-channel",
        "w4a16-rtn-channel",
        *(f"w{b}a16-{m}-g64" for b in (4, 3) for m in ("rtn", "gptq", "awq", "rotate-gptq")),
        *(f"w{b}a16-gptq-g64-actorder" for b in (4, 3)),
        "w4a16-gptq-g64" + ABLATED,
    }
)
# Besides each against rounding: (better, worse).
PAIRS = (
    ("w4a16-gptq-g64-actorder", "w4a16-gptq-g64"),
    ("w3a16-gptq-g64-actorder", "w3a16-gptq-g64"),
    ("w4a16-rotate-gptq-g64", "w4a16-gptq-g64"),
    ("w3a16-rotate-gptq-g64", "w3a16-gptq-g64"),
    ("w4a16-gptq-g64", "w4a16-gptq-g64" + ABLATED),
)


def ladder(
    out: Path,
    recipes: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    *,
    model: str | None = None,
    protocol: str = "full",
    resume: bool = False,
) -> Iterator[dict[str, Any]]:
    """Measure ``recipes`` for each of ``seeds`` and give back each row as it is done.

    Without ``recipes`` it is those of ``LADDER``; of these the ones that are not in ``EVERY_SEED`` have a row
    for the first seed only.

    ``out``, a JSON file, is written whole after every row: how it was measured, every row, and the paired
    differences with their mean and spread over the seeds. ``resume`` keeps the rows that are in it. Raises
    ValueError where it holds rows of another model or protocol, and what ``quantize`` raises.
    """
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if resume and out.exists() else []
    command = _command(out, recipes, seeds, model, protocol)
    for seed in seeds:
        done = {row["recipe"] for row in rows if row["seed"] == seed}
        if recipes is not None:
            rungs = list(recipes)
        else:
            rungs = [name for name in LADDER if seed == seeds[0] or name in EVERY_SEED]
        wanted = [name for name in ("none", *rungs) if name not in done]
        if not wanted:
            continue
        original = load(model, seed=seed)
        spent: list[float] = []
        for name, report in zip(
            wanted, compare_each(_quantized(original, wanted, seed, spent), original, protocol), strict=True
        ):
            row = {
                "seed": seed,
                **report.to_dict(),
                "recipe": name,
                "quantize_seconds": round(spent[-1], 1),
            }
            if rows and (rows[0]["model"], rows[0]["protocol"]) != (row["model"], row["protocol"]):
                raise ValueError(
                    f"{out} was measured on {rows[0]['model']} by protocol {rows[0]['protocol']}, this is "
                    f"{row['model']} by {row['protocol']}; choose another file"
                )
            rows.append(row)
            _write(out, rows, command)
            yield row


def paired(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences of KL and perplexity within each seed, their mean and standard deviation over the seeds."""
    value = {(row["recipe"], row["seed"]): row for row in rows}
    recipes = list(dict.fromkeys(row["recipe"] for row in rows if row["recipe"] != "none"))
    baselines = [(name, BASELINE.format(bits=name[1:].partition("a")[0])) for name in recipes]
    entries = []
    for better, worse in [*(pair for pair in baselines if pair[0] != pair[1]), *PAIRS]:
        seeds = sorted(seed for name, seed in value if name == better and (worse, seed) in value)
        if not seeds:
            continue
        entry: dict[str, Any] = {"recipe": better, "minus": worse, "seeds": seeds}
        for key in ("kl", "perplexity"):
            differences = [value[better, seed][key] - value[worse, seed][key] for seed in seeds]
            spread = statistics.stdev(differences) if len(seeds) > 1 else None
            entry[key] = {"by_seed": differences, "mean": statistics.mean(differences), "stdev": spread}
        entries.append(entry)
    return entries


def measured_on() -> dict[str, Any]:
    """Date, machine, threads and versions, as every file of measurements gives them."""
    packages = ("labkit", "torch", "tokenizers")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "seconds": "wall clock; longer where other work shared the machine",
        "licence": "CC0-1.0",
    }


def _quantized(original: Llama, names: Sequence[str], seed: int, spent: list[float]) -> Iterator[Llama]:
    """The original by each recipe; the seconds that each took go to ``spent``."""
    for name in names:
        start = time.perf_counter()
        plan = name.removesuffix(ABLATED)
        model = original
        if name != "none":
            model = quantize(original, plan, seed=seed, propagate=plan == name)
        spent.append(time.perf_counter() - start)
        yield model


def _command(
    out: Path, recipes: Sequence[str] | None, seeds: Sequence[int], model: str | None, protocol: str
) -> str:
    """What repeats this call, as one types it."""
    words = ["labkit", "bench", "ladder", "--out", out.name]
    words += [word for name in recipes or () for word in ("--recipe", name)]
    words += [word for seed in seeds for word in ("--seed", str(seed))] if tuple(seeds) != SEEDS else []
    words += ["--lesson"] if protocol == "lesson" else []
    words += ["--model", model] if model else []
    return shlex.join(words)


def _write(out: Path, rows: Sequence[dict[str, Any]], command: str) -> None:
    tree = {
        "what": "post-training quantization: KL, perplexity and top-1 by the frozen protocol",
        "command": command,
        **measured_on(),
        "seeds": sorted({row["seed"] for row in rows}),
        "rows": list(rows),
        "paired": paired(rows),
    }
    with whole_file(out) as part:
        part.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
