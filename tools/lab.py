"""Open JupyterLab on the learner's own copies in work/notebooks. Run by `make lab`.

Arguments go to `jupyter lab`. Jupyter's own files (what was open, its settings, run files) stay in
work/.jupyter: nothing lands in the home folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(os.environ.get("LABKIT_WORK") or ROOT / "work")
FIRST = "notebooks/00_start_here.ipynb"
SETTINGS = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}


def main() -> None:
    binaries = ROOT / ".venv" / "bin"
    if subprocess.run([binaries / "labkit", "course", "refresh"], cwd=ROOT).returncode != 0:
        sys.exit("make: the notebooks could not be copied to work/; what to do stands above")
    environment = surroundings(binaries)
    settings = Path(environment["JUPYTER_CONFIG_DIR"]) / "labconfig" / "default_setting_overrides.json"
    if not settings.exists():
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS, indent=1) + "\n")
    command = [
        str(binaries / "jupyter"),
        "lab",
        f"--ServerApp.root_dir={WORK}",
        f"--LabApp.default_url=/lab/tree/{FIRST}",
        "--LanguageServerManager.autodetect=False",  # it runs npm, which writes to the home folder
        *(["--allow-root"] if os.geteuid() == 0 else []),
        *sys.argv[1:],
    ]
    os.execve(command[0], command, environment)


def surroundings(binaries: Path) -> dict[str, str]:
    """The environment for Jupyter. What a person has set already stays."""
    jupyter = WORK / ".jupyter"
    return {
        "JUPYTER_CONFIG_DIR": str(jupyter / "config"),
        "JUPYTER_CONFIG_PATH": str(Path.home() / ".jupyter"),  # a person's own settings still count
        "JUPYTER_DATA_DIR": str(jupyter / "data"),
        "JUPYTER_RUNTIME_DIR": str(jupyter / "runtime"),
        "IPYTHONDIR": str(jupyter / "ipython"),
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",  # for `labkit` in a terminal
    }


if __name__ == "__main__":
    main()
