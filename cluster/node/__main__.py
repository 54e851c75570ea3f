"""``python cluster/node build | up | down | status``: what `make node`, `make node-up` and so on run."""

from __future__ import annotations

import argparse
import subprocess
import sys

import programs
from node import CONTEXT, Node

from labkit.settings import settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("build", "up", "down", "status"))
    parser.add_argument(
        "--keep", action="store_true", help="build: leave Go's caches for the next build, 11 GB"
    )
    parser.add_argument("--second", action="store_true", help="up: a second kubelet too, the node lab-2")
    arguments = parser.parse_args()
    action = arguments.action
    node = Node(settings().node)
    try:
        if action == "build":
            programs.build(node.folder, keep=arguments.keep)
            print(f"The node's programs are in {node.folder}; `make node-up` starts it.")
        elif action == "up":
            node.up()
            if arguments.second:
                node.join()
            print(f"kubectl: {node.bin}/kubectl --kubeconfig {node.kubeconfig} (context {CONTEXT})")
        elif action == "down":
            node.down()
            print("Nothing of the node is left running.")
        else:
            print("\n".join(node.status()))
    except (RuntimeError, PermissionError, subprocess.CalledProcessError) as error:
        print(f"node: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
