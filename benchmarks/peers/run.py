"""rafce_ray next to what people use instead: smiling against neutral on the same photographs, from file to answer.

Every tool is a process of its own (adapters/) with one thread and a warm model. Each photograph goes to one tool after
the other, the first of them another one each time, so that other work on the machine slows all of them alike.

Install the tools first (install.sh), then run:
python benchmarks/peers/run.py --bundle runs/first/bundle [MORE ...] [--data ../shared/data]
It writes results.json and the tables of README.md. Several bundles are seeds of one recipe: figures are means over
them. The answers are kept in .tools/answers.json; --judge judges them again without running a tool.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from judge import Answers, Truth, differences, faces_found, figures, intervals, judge, mean_of

from rafce_ray.base.console import progress_bar
from rafce_ray.base.hardware import num_cores

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TOOLS = HERE / ".tools"
OURS = "rafce_ray"
PEERS = {
    "face-api": ("node", "read_face_api.js", "ssd"),
    "face-api, tiny detector": ("node", "read_face_api.js", "tiny"),
    "human": ("node", "read_human.js"),
    "facex": ("python", "read_facex.py"),
    "fer": ("python", "read_fer.py"),
    "fer, MTCNN": ("python", "read_fer.py", "mtcnn"),
}
WITHOUT_GIVEN = ("human", "face-api, tiny detector", "fer, MTCNN")
"""Not asked for given faces: human has no such call, the other two differ from another tool by their detector alone."""

NUM_WARM_UP = 5
"""Photographs that each tool reads before its answers and times count."""

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
}


class CannotRunError(Exception):
    """What is missing, and what to do."""


@dataclass(frozen=True)
class Photographs:
    """A set of photographs; ``given``: each is one aligned face, and the tools know it."""

    title: str
    paths: list[Path]
    truth: Truth
    given: bool = False


class Tool:
    """A running adapter; ``about`` is what it says of itself."""

    def __init__(self, command: list[str], log: Path) -> None:
        variables = {**os.environ, **ONE_THREAD, "NODE_PATH": str(TOOLS / "node" / "node_modules")}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
            )
        self._log = log
        self.about = self._read()

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def read(self, path: Path, given: bool) -> dict[str, Any]:
        """The adapter's answer for a photograph."""
        print(json.dumps({"path": str(path), "given": given}), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            errors = self._log.read_text().strip().splitlines() or ["it printed nothing"]
            raise CannotRunError(f"{' '.join(self._process.args)} ended: {errors[-1]} All of it: {self._log}")
        return json.loads(line)


def read_photographs(data: Path) -> list[Photographs]:
    """The whole photographs and the aligned faces, the latter twice: to be found, and given."""
    photos, smiles = data / "london_photos", data / "london_smiles"
    if not (photos / "labels.csv").is_file() or not (smiles / "slices.csv").is_file():
        raise CannotRunError(f"{data}: no london_photos and london_smiles here. Give their folder with --data.")
    rows = table(photos / "labels.csv")
    whole = Truth(
        np.array([row["emotion"] == "smiling" for row in rows]),
        np.array([row["split"] == "train" for row in rows]),
        np.array([row["person"] for row in rows]),
    )
    rows_of_faces = table(smiles / "slices.csv")
    names = [row["name"] for row in rows_of_faces]
    emotion, part = codes(smiles / "RAFCE_emolabel.txt"), codes(smiles / "RAFCE_partition.txt")
    aligned = Truth(
        np.array([emotion[name] == "1" for name in names]),
        np.array([part[name] == "0" for name in names]),
        np.array([row["face_id"] for row in rows_of_faces]),
    )
    paths = [smiles / "aligned" / name.replace(".jpg", "_aligned.jpg") for name in names]
    return [
        Photographs("whole photographs", [photos / "images" / row["name"] for row in rows], whole),
        Photographs("aligned faces, to be found", paths, aligned),
        Photographs("aligned faces, given", paths, aligned, given=True),
    ]


def table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def codes(file: Path) -> dict[str, str]:
    """``NAME CODE`` a line."""
    return dict(line.split() for line in file.read_text().splitlines())


def commands(bundles: list[str]) -> dict[str, list[str]]:
    """How each tool is started, by name."""
    interpreters = {"node": "node", "python": str(TOOLS / "python" / "bin" / "python")}
    if not Path(interpreters["python"]).exists() or not (TOOLS / "node" / "node_modules").is_dir():
        raise CannotRunError(f"{TOOLS}: the tools are not installed. Run: bash benchmarks/peers/install.sh")
    ours = {
        f"{OURS} {number}": [sys.executable, str(HERE / "adapters" / "read_rafce.py"), bundle]
        for number, bundle in enumerate(bundles, start=1)
    }
    theirs = {
        name: [interpreters[kind], str(HERE / "adapters" / script), *arguments]
        for name, (kind, script, *arguments) in PEERS.items()
    }
    return ours | theirs


def ask_all(tools: dict[str, Tool], photographs: Photographs) -> dict[str, list[dict[str, Any]]]:
    """Every tool's answer for every photograph, interleaved."""
    names = [name for name in tools if not (photographs.given and name in WITHOUT_GIVEN)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for path in photographs.paths[:NUM_WARM_UP]:
        for name in names:
            tools[name].read(path, photographs.given)
    with progress_bar(photographs.title, len(photographs.paths)) as advance:
        for number, path in enumerate(photographs.paths):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(tools[name].read(path, photographs.given))
            advance(1)
    return found


def answers_of(lines: list[dict[str, Any]]) -> Answers:
    """An adapter's lines as columns."""

    def column(key: str) -> np.ndarray:
        return np.array([np.nan if line[key] is None else line[key] for line in lines], dtype=np.float64)

    return Answers(
        np.array([line["faces"] for line in lines]),
        column("p_happy"),
        column("p_neutral"),
        np.array([line["own_answer"] or "" for line in lines]),
    )


def results_of(photographs: Photographs, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is written of one set of photographs."""
    truth = photographs.truth
    names = {OURS: [name for name in found if name.startswith(OURS)]}
    names |= {name: [name] for name in found if not name.startswith(OURS)}
    each = {name: judge(answers_of(lines), truth) for name, lines in found.items()}
    judged = {name: mean_of([each[one] for one in models]) for name, models in names.items()}
    held = np.flatnonzero(~truth.train)
    tools = {}
    for name, models in names.items():
        one, lines = judged[name], [line for model in models for line in found[model]]
        tools[name] = {
            "faces": faces_found(np.array([line["faces"] for line in lines])),
            **figures(one),
            "intervals": intervals(one, truth),
            "score": one.score,
            "threshold": one.threshold,
            "ms": spread([line["ms"] for line in lines]),
            "cpu_ms": spread([line["cpu_ms"] for line in lines]),
            "wrong_fitted": [photographs.paths[held[row]].name for row in np.flatnonzero(one.fitted < 0.5)],
        }
        if name == OURS:
            tools[name]["by_bundle"] = [figures(each[model]) for model in models]
        else:
            tools[name]["ours_minus_theirs"] = differences(judged[OURS], one, truth)
    return {
        "title": photographs.title,
        "photographs": len(truth.train),
        "held_out": len(held),
        "people_held_out": len(np.unique(truth.person[held])),
        "tools": tools,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and 90th percentile."""
    return {"median": float(np.median(values)), "p90": float(np.percentile(values, 90))}


def description(tool: Tool) -> dict[str, Any]:
    """What an adapter says of itself, with size and sha256 of its model files, without places of this machine."""
    about = dict(tool.about)
    about["files"] = [
        {
            "name": Path(file).name,
            "bytes": Path(file).stat().st_size,
            "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        }
        for file in about["files"]
    ]
    return about


def in_markdown(results: dict[str, Any]) -> Iterator[str]:
    """The tables of README.md."""
    yield f"Measured on {results['date']}, {results['machine']}, in {results['seconds']:.0f} s."
    count = len(results["sets"][0]["tools"][OURS]["by_bundle"])
    models = "1 model" if count == 1 else f"means over {count} models"
    yield f"`{OURS}` is {models}: {results['tools'][f'{OURS} 1']['model']}."
    for one in results["sets"]:
        yield ""
        yield f"### {one['title'].capitalize()}"
        yield ""
        yield (
            f"{one['photographs']} pictures; accuracies and AUC on the {one['held_out']} of the "
            f"{one['people_held_out']} held-out people."
        )
        yield ""
        yield (
            "| tool | one face, none, several | own answer | first of all emotions | fitted threshold | AUC "
            "| ms (CPU) |"
        )
        yield "|---|---|---|---|---|---|---|"
        for name, tool in one["tools"].items():
            cells = [f"{tool[key]:.3f} ({low:.2f}-{high:.2f})" for key, (low, high) in tool["intervals"].items()]
            faces = ", ".join(f"{100 * tool['faces'][key]:.0f} %" for key in ("one", "none", "several"))
            times = f"{tool['ms']['median']:.0f} ({tool['cpu_ms']['median']:.0f})"
            yield f"| {name} | {faces} | {' | '.join(cells)} | {times} |"
        yield ""
        yield f"| {OURS} minus | own answer | first of all emotions | fitted threshold | AUC | their CPU ms / ours |"
        yield "|---|---|---|---|---|---|"
        ours_ms = one["tools"][OURS]["cpu_ms"]["median"]
        for name, tool in one["tools"].items():
            if name != OURS:
                cells = [
                    f"{difference['value']:+.3f} ({difference['low']:+.2f} to {difference['high']:+.2f})"
                    for difference in tool["ours_minus_theirs"].values()
                ]
                yield f"| {name} | {' | '.join(cells)} | {tool['cpu_ms']['median'] / ours_ms:.1f} |"
    yield ""
    yield "### Versions, licences and model files"
    yield ""
    yield "| tool | versions | licence | model files (bytes, sha256) |"
    yield "|---|---|---|---|"
    for name, about in results["tools"].items():
        versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
        files = ", ".join(f"`{file['name']}` ({file['bytes']:,}, `{file['sha256'][:12]}`)" for file in about["files"])
        yield f"| {name} | {versions} | {about['licence']} | {files} |"


def write_page(results: dict[str, Any], page: Path) -> None:
    """The tables between the markers of a page."""
    begin, end = "<!-- begin: written by run.py -->\n", "<!-- end -->"
    before, _, rest = page.read_text().partition(begin)
    after = rest.partition(end)[2]
    page.write_text(before + begin + "\n".join(in_markdown(results)) + "\n" + end + after)


def measure(bundles: list[str], sets: list[Photographs]) -> dict[str, Any]:
    """What every tool is, and its answers for each set of photographs."""
    began = time.monotonic()
    with ExitStack() as stack:
        tools = {
            name: stack.enter_context(Tool(command, TOOLS / f"{name.replace(', ', '_').replace(' ', '_')}.log"))
            for name, command in commands(bundles).items()
        }
        return {
            "date": datetime.date.today().isoformat(),
            "machine": f"{num_cores()} CPU cores, {platform.system()} {platform.machine()}",
            "tools": {name: description(tool) for name, tool in tools.items()},
            "answers": [ask_all(tools, photographs) for photographs in sets],
            "seconds": time.monotonic() - began,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", nargs="+", help="bundles of one recipe, one for each seed")
    parser.add_argument("--judge", action="store_true", help="judge the answers of the last run again")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of results.json and README.md")
    arguments = parser.parse_args()
    if bool(arguments.bundle) == arguments.judge:
        parser.error("give --bundle, or --judge for the answers of the last run")
    sets, kept = read_photographs(arguments.data), TOOLS / "answers.json"
    if arguments.bundle:
        kept.write_text(json.dumps(measure(arguments.bundle, sets)))
    measured = json.loads(kept.read_text())
    answers = measured.pop("answers")
    results = measured | {"sets": [results_of(one, found) for one, found in zip(sets, answers, strict=True)]}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_page(results, arguments.out / "README.md")
    print("\n".join(in_markdown(results)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotRunError as error:
        sys.exit(f"{error}")
