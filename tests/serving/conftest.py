"""Servers run where they cannot meet anything else: in a network of their own with nothing but loopback,
and among processes of their own, so that what they leave behind can be counted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

INSIDE = "LABKIT_TEST_NAMESPACE"
UNSHARE = [
    "unshare",
    *([] if os.geteuid() == 0 else ["-r"]),
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
# bash stays as process 1, which buries the orphans; a Python there would leave them as zombies.
IN_NAMESPACE = [*UNSHARE, "bash", "-c", 'ip link set lo up || exit 97; "$@"; exit $?', "bash"]


def _can_unshare() -> bool:
    if not all(map(shutil.which, ("unshare", "ip", "bash"))):
        return False
    return subprocess.run([*IN_NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Start this very pytest again inside, in place of this process, where the machine allows it.

    Called when tests/serving is named on the command line; otherwise the tests run where they are.
    """
    if os.environ.get(INSIDE) == "1" or config.option.help or not _can_unshare():
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()
    os.environ[INSIDE] = "1"
    os.execvp(
        IN_NAMESPACE[0], [*IN_NAMESPACE, sys.executable, "-m", "pytest", *config.invocation_params.args]
    )
