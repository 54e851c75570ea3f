"""Compile ``native/library.cpp`` where it is first needed, for the processor that is there, and keep what came out."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

from labkit.files import whole_file

FOLDER = Path(__file__).with_name("native")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fopenmp-simd", "-fno-math-errno")


class Unavailable(RuntimeError):
    """No library can be made here: the message says what is missing and what to do."""


@cache
def library(march: str = "native") -> ctypes.CDLL:
    """The library for a processor in the compiler's own words, compiled (in seconds) unless the cache has it.

    The file's name is a hash of sources, compiler, flags and what the processor can do, so that a cache that
    several machines share never gives one of them another's. Whoever is first leaves it whole under its name;
    two that compile at once do the same work twice. The compiler is that of the environment variable CXX, or
    c++, g++ or clang++. Raises Unavailable.
    """
    from labkit.settings import settings  # needs platformdirs, which the arithmetic itself does not

    compiler = _compiler()
    sources = [path.read_text() for path in sorted(FOLDER.iterdir())]
    parts = (*sources, _version(compiler), *FLAGS, march, _processor())
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    target = settings().cache / "kernels" / f"native-{key[:16]}.so"
    if not target.exists():
        _compile(compiler, march, target)
    try:
        made = ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(f"{target} does not load: {error}; remove it") from error
    return declared(made)


class Weight(ctypes.Structure):
    """``Linear`` of native/product.h: addresses of tensors that somebody else keeps alive, or None."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("bits", "half", "own")),
        *((name, ctypes.c_void_p) for name in ("codes", "table", "scale", "offset", "bias", "order")),
        *((name, ctypes.c_int64) for name in ("out", "columns", "inputs", "width", "input_width")),
    ]


def declared(made: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' argument types."""
    pointer, long = ctypes.c_void_p, ctypes.c_long
    made.labkit_linear.argtypes = [pointer, pointer, pointer, long, ctypes.c_int]
    made.labkit_step.argtypes = [*[pointer] * 3, long, *[pointer] * 2, long, long, *[pointer] * 2, ctypes.c_int]
    made.labkit_sum.argtypes = [pointer, long, ctypes.c_int]
    made.labkit_columns.argtypes = [pointer, ctypes.c_int]
    made.labkit_linear.restype = made.labkit_columns.restype = made.labkit_step.restype = None
    made.labkit_sum.restype = ctypes.c_float
    made.labkit_arithmetic.restype = ctypes.c_char_p
    return made


@cache
def why_not() -> str | None:
    """What keeps ``library()`` from being there, or None."""
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise Unavailable(
        "no C++ compiler; install one (Debian and Ubuntu: g++, macOS: xcode-select --install)"
    )


def _version(compiler: list[str]) -> str:
    try:
        told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"the C++ compiler {shlex.join(compiler)} does not run: {error}") from error
    return told.stdout


def _compile(compiler: list[str], march: str, target: Path) -> None:
    try:
        with whole_file(target) as part:
            command = [*compiler, *FLAGS, f"-march={march}", str(FOLDER / "library.cpp"), "-o", str(part)]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode != 0:
                said = [line for line in ran.stderr.splitlines() if "error" in line] or ["it said no error"]
                raise Unavailable(f"`{shlex.join(command)}` failed: {said[0].strip()}")
    except OSError as error:
        raise Unavailable(f"{target.parent} cannot be written: {error}; set LABKIT_CACHE") from error


def _processor() -> str:
    """What the processor says that it can do, as far as Linux tells; elsewhere the compiler's -march decides."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(dict.fromkeys(told)) or os.uname().machine
