"""The ladder of post-training recipes on the bundled model, over three seeds, paired within a seed.

    python tests/bench/ptq_ladder.py --out data/measurements/ptq_ladder.json

A seed draws the off-grid factors and the calibration windows anew; the evaluation windows never change. The
file is written anew after every seed. About seven minutes a seed on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from labkit import models
from labkit.files import whole_file

LADDER = [
    "w4a16-rtn-g64",
    "w4a16-gptq-g64",
    "w4a16-gptq-g64-actorder",
    "w3a16-rtn-g64",
    "w3a16-gptq-g64",
    "w8a16-rtn-channel",
    "w4a16-rtn-channel",
]
# (better, worse): the difference better - worse within each seed, then its mean and spread over the seeds.
PAIRS = [
    ("w4a16-gptq-g64", "w4a16-rtn-g64"),
    ("w4a16-gptq-g64-actorder", "w4a16-gptq-g64"),
    ("w3a16-gptq-g64", "w3a16-rtn-g64"),
    ("w4a16-rtn-g64", "w4a16-rtn-channel"),
]
# The ablation: Hessians from the unquantized model. It is a recipe of LADDER with the flag turned off.
ABLATION = "w4a16-gptq-g64"
ABLATED = f"{ABLATION}, propagate=False"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", choices=["full", "lesson"], default="full")
    parser.add_argument("--model", default=None, help="default: the bundled model")
    parser.add_argument("--resume", action="store_true", help="keep the seeds that --out has already")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.resume else []
    write(args, rows)
    for seed in sorted(set(args.seeds) - {row["seed"] for row in rows}):
        original = models.load(args.model, seed=seed)
        seconds: list[float] = []

        def quantized(
            original: models.Llama = original, seed: int = seed, seconds: list[float] = seconds
        ) -> Any:
            yield original
            for name, propagate in [*((name, True) for name in LADDER), (ABLATION, False)]:
                start = time.perf_counter()
                model = models.quantize(original, name, seed=seed, propagate=propagate)
                seconds.append(time.perf_counter() - start)
                yield model

        reports = models.compare(quantized(), original, args.protocol)
        names = ["none", *LADDER, ABLATED]
        for name, report, spent in zip(names, reports, [0.0, *seconds], strict=True):
            row = {"seed": seed, **report.to_dict(), "recipe": name, "quantize_seconds": round(spent, 1)}
            rows.append(row)
            print(
                f"seed {seed}  {name:36} ppl {report.perplexity:7.2f}  KL {report.kl:.4f}  "
                f"top1 {report.top1:.3f}  {spent:5.1f} s",
                flush=True,
            )
        write(args, rows)


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if rows:
        with whole_file(args.out) as part:
            part.write_text(json.dumps(record(args, rows), indent=1) + "\n", encoding="utf-8")
            part.chmod(0o644)


def record(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What goes into the file: how it was measured, every report, and the paired differences."""
    seeds = sorted({row["seed"] for row in rows})
    value = {(row["recipe"], row["seed"]): row for row in rows}
    pairs = []
    for better, worse in [*PAIRS, (ABLATION, ABLATED)]:
        entry: dict[str, Any] = {"recipe": better, "minus": worse}
        for key in ("kl", "perplexity"):
            differences = [value[better, seed][key] - value[worse, seed][key] for seed in seeds]
            spread = statistics.stdev(differences) if len(seeds) > 1 else None
            entry[key] = {"by_seed": differences, "mean": statistics.mean(differences), "stdev": spread}
        pairs.append(entry)
    flags = f" --model {args.model}" if args.model else ""
    if seeds != [0, 1, 2]:
        flags += f" --seeds {' '.join(map(str, seeds))}"
    flags += f" --protocol {args.protocol}" if args.protocol != "full" else ""
    return {
        "what": "post-training quantization: KL, perplexity and top-1 by the frozen protocol",
        "command": f"python tests/bench/ptq_ladder.py --out data/measurements/{args.out.name}{flags}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("labkit", "torch", "tokenizers")}
        | {"python": platform.python_version()},
        "seconds": "wall clock; longer where other work shared the machine",
        "licence": "CC0-1.0",
        "seeds": seeds,
        "rows": rows,
        "paired": pairs,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
