"""Set the lab up: uv, then .venv at the versions of constraints.txt, then the model. Run by `make setup`.

Standard library only, and in the words of Python 3.6, so that an old one gets a reason, not a SyntaxError.
Writes to .venv (uv itself lies in .venv/uv) and to the caches of uv and the lab, and nowhere else.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
UV = os.path.join(VENV, "uv", "bin", "uv")
STAMP = os.path.join(VENV, "labkit-setup.json")
UV_VERSION = "0.13.9"
PYTHONS = ((3, 11), (3, 12), (3, 13))
STEPS = ("uv", "the environment", "the packages", "the model")
GIGABYTES = "about 6.5 GB of disk (3 GB to download)"
MINUTES = "1 to 10 minutes"


class Stop(Exception):
    """A step failed; the text says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make setup", description=__doc__.splitlines()[0])
    parser.add_argument("--torch-backend", default="", help="handed on to uv, for example cpu")
    options = parser.parse_args()
    try:
        check_machine(sys.version_info[:2], platform.system(), platform.machine())
    except Stop as stop:
        print(f"make: cannot set up: {stop}", file=sys.stderr)
        return 1
    backend = options.torch_backend or stamp().get(
        "torch_backend", ""
    )  # chosen once, kept until another is named
    wanted = fingerprint(backend)
    ready = is_ready(wanted)
    if not ready:
        print(f"Setting up in .venv: {GIGABYTES} and {MINUTES}, once; then seconds.", flush=True)
        if not backend and not nvidia_driver():
            print(
                "No NVIDIA driver here: `make lab TORCH_BACKEND=cpu` takes the small build of PyTorch, "
                "from PyTorch's own index.",
                flush=True,
            )
    step = 0
    began = time.time()
    try:
        if not ready:
            clear_old(wanted)
            for step, work in enumerate((bootstrap_uv, make_venv, install)):
                say(step)
                work(backend)
            with open(STAMP + ".part", "w") as file:
                json.dump(wanted, file, indent=1)
            os.replace(STAMP + ".part", STAMP)
        step = 3
        if not ready:
            say(step)
        fetch_model()
    except Stop as stop:
        print(
            f"\nmake: step {step + 1} of {len(STEPS)} ({STEPS[step]}) failed.\n{stop}\n"
            "Then run the same command again: it goes on from there.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\nmake: interrupted; run the same command again and it goes on from there.", file=sys.stderr)
        return 130
    if not ready:
        print(f"Set up in {time.time() - began:.0f} s.", flush=True)
    return 0


def say(step: int) -> None:
    print(f"[{step + 1}/{len(STEPS)}] {STEPS[step]}", flush=True)


def check_machine(version: tuple, system: str, machine: str) -> None:
    """Raise Stop where the lab cannot be installed."""
    if version not in PYTHONS:
        found = [name for name in ("python3.13", "python3.12", "python3.11") if runs(name, "-c", "")]
        remedy = (
            f"run `make lab PYTHON={found[0]}`"
            if found
            else (
                "install one (Debian and Ubuntu: apt install python3; macOS: brew install python@3.12) "
                "and run `make lab PYTHON=python3.12`"
            )
        )
        raise Stop(f"Python 3.11, 3.12 or 3.13 is needed, this is {version[0]}.{version[1]}; {remedy}")
    if system == "Darwin" and machine == "x86_64":
        raise Stop(
            "PyTorch no longer exists for Macs with an Intel processor; use a Linux machine or a hub"
        )
    if system == "Windows":
        raise Stop("Windows itself is not supported; clone the lab inside WSL, in your Linux home folder")


def runs(*command: str) -> bool:
    """Whether that command is really there and works (a pyenv shim may exist and refuse)."""
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def nvidia_driver() -> bool:
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def fingerprint(torch_backend: str) -> dict:
    """What the environment depends on; when one of these changes it is brought up to date."""
    files = {}
    for name in ("constraints.txt", "pyproject.toml"):
        with open(os.path.join(ROOT, name), "rb") as file:
            files[name] = hashlib.sha256(file.read()).hexdigest()
    return {
        "files": files,
        "folder": ROOT,
        "python": "{}.{}".format(*sys.version_info[:2]),
        "torch_backend": torch_backend,
    }


def stamp() -> dict:
    try:
        with open(STAMP) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def is_ready(wanted: dict) -> bool:
    return stamp() == wanted and runs(PYTHON, "-c", "")


def clear_old(wanted: dict) -> None:
    """Forget an environment of another Python or of a folder that has moved; keep uv."""
    old = stamp()
    if os.path.exists(STAMP):
        os.remove(STAMP)
    if not os.path.isdir(VENV):
        return
    same = not old or all(old.get(key) == wanted[key] for key in ("folder", "python"))
    if same and (not os.path.lexists(PYTHON) or python_of(PYTHON) == wanted["python"]):
        return
    for name in os.listdir(VENV):
        path = os.path.join(VENV, name)
        if name == "uv":
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def python_of(path: str) -> str:
    try:
        out = subprocess.check_output(
            [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return out.decode().strip()


def run(command: list, remedy: str) -> None:
    # A person's own activated environment or UV_ settings for a project must not redirect ours.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("VIRTUAL_ENV", "UV_PYTHON", "PYTHONHOME", "PYTHONPATH")
    }
    environment.update(
        UV_PYTHON_DOWNLOADS="never", PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0", PIP_ROOT_USER_ACTION="ignore"
    )
    status = subprocess.call(command, cwd=ROOT, env=environment)
    if status != 0:
        shown = " ".join(os.path.relpath(word, ROOT) if word.startswith(VENV) else word for word in command)
        raise Stop(f"`{shown}` ended with status {status}; its own words stand above.\n{remedy}")


NETWORK = (
    "If it could not reach a package index: check the network, or the index and proxy that "
    "pip and uv are configured with (PIP_INDEX_URL, UV_DEFAULT_INDEX, HTTPS_PROXY)."
)


def bootstrap_uv(_: str) -> None:
    """uv into .venv/uv. With --target pip needs no venv module and may be a managed system's."""
    if uv_version(UV) == UV_VERSION:
        return
    target = os.path.dirname(os.path.dirname(UV))
    if runs(sys.executable, "-m", "pip", "--version"):
        shutil.rmtree(target, ignore_errors=True)
        run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-cache-dir",
                "--no-warn-script-location",
                "--only-binary",
                ":all:",
                "--target",
                target,
                "uv==" + UV_VERSION,
            ],
            NETWORK,
        )
        return
    found = shutil.which("uv")
    if found is None or not uv_version(found):
        raise Stop(
            f"{sys.executable} has no pip, and there is no uv. Install either: Debian and Ubuntu "
            f"`apt install python3-pip`, elsewhere `{sys.executable} -m ensurepip`."
        )
    shutil.rmtree(target, ignore_errors=True)
    os.makedirs(os.path.dirname(UV))
    os.symlink(found, UV)


def uv_version(path: str) -> str:
    try:
        return subprocess.check_output([path, "--version"], stderr=subprocess.DEVNULL).decode().split()[1]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def make_venv(_: str) -> None:
    run(
        [UV, "venv", "--quiet", "--allow-existing", "--python", sys.executable, VENV],
        "Remove .venv (`make clean`), or choose another Python (`make lab PYTHON=python3.12`).",
    )


def install(torch_backend: str) -> None:
    backend = ["--torch-backend", torch_backend] if torch_backend else []
    run(
        [
            UV,
            "pip",
            "install",
            "--python",
            PYTHON,
            "--constraints",
            "constraints.txt",
            *backend,
            "--editable",
            ".[all]",
        ],
        NETWORK + f"\nIf the disk is full: it needs {GIGABYTES}; `df -h .` shows what is free.",
    )


def fetch_model() -> None:
    run(
        [os.path.join(VENV, "bin", "labkit"), "models", "fetch"],
        NETWORK + "\n`labkit doctor` looks at the cache, the disk and the rest of the machine.",
    )


if __name__ == "__main__":
    sys.exit(main())
