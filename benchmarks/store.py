"""Peak memory of building a store, and the time to open it, at 5,000 and at 100,000 images.

A few hundred drawn faces are hard-linked under as many names as are wanted. Each measurement is a process of its own:
its peak resident memory is what the operating system counted. Run: python benchmarks/store.py [--sizes 5000 100000]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rafce_drawing.labelled import synthesize
from rafce_ray.config import DataConfig
from rafce_ray.data.label_file import ACTION_UNIT_FILE, EMOTION_FILE, PARTITION_FILE, VOTES_FILE
from rafce_ray.data.loader import open_dataset, prepare

NUM_DRAWN = 300
MAX_GROWTH = 1.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 100_000], help="numbers of images")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder, removed at the end)")
    parser.add_argument("--measure", nargs=2, metavar=("ROOT", "STORES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return 0
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="store-benchmark-"))
    try:
        drawn = folder / "drawn"
        if not drawn.exists():
            synthesize(drawn, NUM_DRAWN)
        results = {size: measure_size(drawn, folder, size) for size in arguments.sizes}
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    return report(results)


def measure_size(drawn: Path, folder: Path, size: int) -> dict[str, dict[str, float]]:
    """Build, start again on the finished store, and open it alone; each in its own process."""
    root, stores = folder / f"faces-{size}", folder / f"stores-{size}"
    multiply(drawn, root, size)
    shutil.rmtree(stores, ignore_errors=True)
    results = {}
    for phase in ("build", "again"):
        command = [sys.executable, __file__, "--measure", str(root), str(stores)]
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[phase] = json.loads(finished.stdout.splitlines()[-1])
    shutil.rmtree(root)
    shutil.rmtree(stores)
    return results


def multiply(drawn: Path, root: Path, size: int) -> None:
    """A dataset of ``size`` labelled names whose images are hard links to the drawn ones."""
    shutil.rmtree(root, ignore_errors=True)
    (root / "aligned").mkdir(parents=True)
    for name in (EMOTION_FILE, ACTION_UNIT_FILE, PARTITION_FILE, VOTES_FILE):
        labels = dict(line.split(" ", 1) for line in (drawn / name).read_text().splitlines())
        stems = sorted(labels)[:NUM_DRAWN]
        with (root / name).open("w") as stream:
            stream.writelines(f"{i:06d}.jpg {labels[stems[i % len(stems)]]}\n" for i in range(size))
    for i in range(size):
        source = Path(stems[i % len(stems)]).stem
        os.link(drawn / "aligned" / f"{source}_aligned.jpg", root / "aligned" / f"{i:06d}_aligned.jpg")


def measure(root: str, stores: str) -> dict[str, float]:
    """Prepare (build where there is none) and open; seconds and MiB of this process."""
    data = DataConfig(root=root, store_dir=stores)
    began = time.perf_counter()
    prepared = prepare(data)
    prepared_s = time.perf_counter() - began
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    dataset = open_dataset(prepared.store, prepared.taxonomy, data.null_policy)
    opened_s = time.perf_counter() - began
    return {"num_images": len(dataset.images), "prepared_s": prepared_s, "opened_s": opened_s, "peak_mib": peak_mib}


def report(results: dict[int, dict[str, dict[str, float]]]) -> int:
    table = Table(title="store")
    for title in ("images", "build s", "images/s", "build peak MiB", "second start s", "open alone s"):
        table.add_column(title, justify="right")
    for size, phases in results.items():
        build, again = phases["build"], phases["again"]
        table.add_row(
            f"{size:,}",
            f"{build['prepared_s']:.1f}",
            f"{size / build['prepared_s']:,.0f}",
            f"{build['peak_mib']:.1f}",
            f"{again['prepared_s']:.2f}",
            f"{again['opened_s']:.3f}",
        )
    Console().print(table)
    peaks = [phases["build"]["peak_mib"] for _, phases in sorted(results.items())]
    ratio = peaks[-1] / peaks[0]
    print(f"peak memory, largest to smallest: {ratio:.3f} (goal: at most {MAX_GROWTH})")
    return 0 if ratio <= MAX_GROWTH else 1


if __name__ == "__main__":
    raise SystemExit(main())
