"""The conversation with run.py: a line of JSON in for each photograph, a line of JSON out."""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

Face = tuple[float, dict[str, float]]
"""Area of its box, and its score by emotion; ``happy`` and ``neutral`` are among them."""


def answer(
    packages: list[str], licence: str, files: list[Path], read: Callable[[str, bool], list[Face]], **notes: str
) -> None:
    """Print what the tool is, then one line for each photograph that standard input names.

    ``read(file, given)``: the faces of a file; ``given``: the whole picture is one aligned face.
    """
    versions = {name: version(name) for name in packages} | {"python": sys.version.split()[0]}
    first_line = {"versions": versions, "licence": licence, "files": [str(file) for file in files], **notes}
    print(json.dumps(first_line), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        faces = read(asked["path"], asked["given"])
        ms, cpu_ms = 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)
        scores = max(faces, key=lambda face: face[0])[1] if faces else {}
        result = {
            "path": asked["path"],
            "faces": len(faces),
            "p_happy": scores.get("happy"),
            "p_neutral": scores.get("neutral"),
            "own_answer": max(scores, key=scores.__getitem__) if scores else None,
            "ms": ms,
            "cpu_ms": cpu_ms,
        }
        print(json.dumps(result), flush=True)
