"""labkit.quant and labkit.kernels need torch, and pull in nothing that torch does not."""

import subprocess
import sys

HEAVY = [
    "transformers",
    "ray",
    "jupyter_core",
    "IPython",
    "ipywidgets",
    "pandas",
    "plotly",
    "bitsandbytes",
    "safetensors",
]


def test_importing_pulls_in_nothing_heavy() -> None:
    # labkit.kernels imports labkit.quant, so one process answers for both.
    code = (
        "import sys, torch; before = set(sys.modules);"
        "import labkit.kernels; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = run.stdout.split()
    assert {"labkit.kernels", "labkit.quant"} <= set(modules)
    pulled = {name.split(".")[0] for name in modules}
    assert not pulled & set(HEAVY)
    assert not {name for name in pulled - {"labkit"} if name not in sys.stdlib_module_names}
