"""The far side of the pipe: a request a line, an answer a line. Standard library only.

    python speak.py llama_cpp

A request is a JSON list: a method of ``with_llama_cpp.Peer`` and its arguments. The answer is ``{"value": ...}``, or
``{"error": "..."}`` where the method raised. It ends with its input.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print what they like; the answers' line is not theirs
    peer = importlib.import_module(f"with_{sys.argv[1]}").Peer()
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        try:
            answer = {"value": getattr(peer, method)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
