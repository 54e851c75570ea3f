"""What the kernels for GPUs are once compiled: registers, shared memory, spills, tensor-core instructions.

    python tests/bench/compiled.py --out data/measurements/gpu_compiled.json

For A100, H100 and B200, by Triton and the assembler it brings; no GPU is needed, and nothing is timed. Under a minute.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path

from labkit.files import whole_file
from labkit.kernels.gpu.compiled import REGISTERS, SHARED, rows
from labkit.models.ladder import measured_on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    made = []
    print(f"{'':8}{'kernel':42}{'warps':>6}{'registers':>10}{'shared':>8}{'spilled':>8}  tensor cores")
    for row in rows():
        made.append(row)
        print(f"{row.architecture:8}{row.kernel:42}{row.warps:6}{row.registers:10}{row.shared:8}{row.spilled:8}  "
              f"{', '.join(row.instructions) or '-'}", flush=True)  # fmt: skip
    if args.out:
        common = measured_on()
        common["versions"]["triton"] = importlib.metadata.version("triton")
        del common["seconds"], common["threads"]  # nothing was timed
        tree = {
            "what": "labkit.kernels.gpu compiled ahead of time, in the default configurations; not run on a GPU",
            "command": "python tests/bench/compiled.py --out data/measurements/gpu_compiled.json",
            **common,
            "limits": {
                "registers": REGISTERS,
                "shared": {f"sm_{name}": size for name, size in SHARED.items()},
            },
            "rows": [asdict(row) for row in made],
        }
        with whole_file(args.out) as part:
            part.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
