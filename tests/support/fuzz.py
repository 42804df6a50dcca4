"""Seeded fuzz of the commands: each case is a valid command line whose arguments, environment or files were changed.

None may end in a traceback.

  python tests/support/fuzz.py [--cases 2000] [--seed 0] [--verbs train,tune] [--show 3] [--world FOLDER]

A case is a command of ``COMMANDS`` in a folder of its own, with up to three changes. It is run in a fork of this
process, so that a case takes a fraction of a second. A command that gets as far as starting Ray has read all that a
user can get wrong, and ends there. Exit code 1 when a case ended in a traceback, by a signal, or did not end within two
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

TIMEOUT_S = 120
REACHED_RAY = 77
"""Exit code of a case that would have started Ray."""
DOCUMENTED = (0, 1, 2, 3, REACHED_RAY)

COMMANDS: tuple[tuple[str, ...], ...] = (
    (
        "train",
        "--recipe",
        "demo",
        "data.root=faces",
        "run.name=new",
        "model.backbone=mobilenet_v3_small",
        "model.weights=none",
        "optim.epochs=1",
    ),
    ("train", "--config", "run.yaml", "run.name=new", "optim.batch_size=16"),
    ("train", "--config", "runs/tiny/config.yaml", "--resume", "optim.epochs=4"),
    ("train", "data.root=table", "run.name=new", "optim.lr=1e-3"),
    ("tune", "--config", "study.yaml", "num_trials=2"),
    ("tune", "--config", "study.yaml", "--dry-run", "base.optim.epochs=2"),
    ("predict", "--bundle", "bundle", "--out", "answers.csv", "--faces", "aligned", "photos"),
    ("predict", "--bundle", "runs/tiny", "--top-k", "2", "photos/0001.jpg", "photos/0002.png"),
    (
        "predict",
        "--bundle",
        "bundle",
        "--device",
        "cpu",
        "--batch-size",
        "2",
        "--out",
        "answers.parquet",
        "photos/*.jpg",
    ),
    ("serve", "--bundle", "bundle", "--port", "8765", "--replicas", "1", "limits.max_requests=8"),
    ("serve", "--registry", "registry", "--keys", "keys.json", "--host", "127.0.0.1", "--engine", "torch"),
    ("data", "audit", "faces"),
    ("data", "audit", "table", "--json", "audit.json"),
    ("data", "align", "table", "--out", "aligned_faces", "--px", "64", "--several", "skip"),
    ("data", "fetch", "london", "--url", "http://127.0.0.1:9", "--out", "london"),
    ("data", "synthesize", "--out", "drawn", "--num-images", "4"),
    ("evaluate", "--bundle", "bundle", "--split", "test", "data.root=faces", "--batch-size", "8"),
    ("evaluate", "--bundle", "runs/tiny", "--json", "data.root=faces"),
    ("doctor", "runs/tiny", "--json"),
    ("doctor", "runs/study"),
    ("report", "runs/tiny", "--out", "page.html", "--no-images", "--slices", "slices.csv"),
    ("report", "runs/study", "--out", "page.html"),
    ("bundle", "list", "registry"),
    ("bundle", "show", "registry"),
    ("bundle", "add", "registry", "bundle", "--as", "another"),
    ("bundle", "promote", "registry", "bundle", "--as", "third", "--force", "--why", "a test", "--engine", "torch"),
    ("bundle", "rollback", "registry", "--why", "a test"),
    ("export", "--bundle", "bundle", "--format", "openvino", "--out", "exported"),
    ("trials", "runs/study", "--sort", "score", "--top", "3"),
    ("compare", "runs/tiny", "runs/tiny", "--split", "validation"),
    ("ablate", "--config", "run.yaml", "--seeds", "1", "--arms", "emotion-only"),
    ("replay", "runs/tiny", "data.root=faces"),
    ("monitor", "--write-only", "--out", "monitor", "--ray-folder", "ray"),
)

STRANGE = (
    *("", " ", "-1", "0", "1", "1.5", "1e999", "nan", "true", "null", "[]", "{}", "[1, 2", "{a: 1}", "12:30", "010"),
    *(
        "~",
        "~nobody/x",
        ".",
        "..",
        "/",
        "/dev/null",
        "no/such",
        "a" * 300,
        "caf\udce9",
        "new\nline",
        "faces #2",
        "x: y",
        "'",
        '"',
    ),
    *(
        "\x1b[31m",
        "--",
        "-x",
        "=",
        "a=b",
        "*",
        "[",
        "s3://",
        "file:///no",
        "http://x",
        "cuda",
        "cuda:99",
        "cpu",
        "auto",
        "\u00e9",
    ),
    *("99999999999999999999", "0x10", "1_000", "٣", "!!python/object:os.system x", "&a *a", "%", "{", "\t"),
)
KEYS = (
    *(
        "data.root",
        "data.images",
        "data.emotions",
        "data.action_units",
        "data.store_dir",
        "data.null_policy",
    ),
    *(
        "model.backbone",
        "model.image_px",
        "model.dropout",
        "model.weights",
        "optim.epochs",
        "optim.lr",
        "optim.batch_size",
    ),
    *(
        "optim.score_au_share",
        "loss.imbalance",
        "loss.au_weight",
        "augment.rotation_deg",
        "run.name",
        "run.storage",
        "run.seed",
    ),
    *(
        "run.precision",
        "run.num_workers",
        "run.use_gpu",
        "run.checkpoint_every_steps",
        "base.optim.lr",
        "space.optim.lr",
    ),
    *(
        "space",
        "base",
        "num_trials",
        "metric",
        "scheduler.name",
        "search",
        "name",
        "storage",
        "limits.deadline_s",
        "optim",
        "nonsense.key",
    ),
)
VARIABLES = (
    *(
        "RAY_ADDRESS",
        "RAY_TMPDIR",
        "HOME",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "COLUMNS",
        "TERM",
        "LANG",
        "LC_ALL",
        "PYTHONIOENCODING",
    ),
    *(
        "AWS_ENDPOINT_URL",
        "OMP_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "NO_COLOR",
        "MLFLOW_TRACKING_URI",
        "RAY_AUTH_MODE",
    ),
)


@dataclass
class Case:
    """A command line, what its environment has besides, and what was changed of its files."""

    number: int
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """How a case ended: its exit code (negative: a signal), both of its outputs, and whether that is a fault."""

    case: Case
    code: int
    said: str

    @property
    def fault(self) -> str | None:
        """Why this is no way for a command to end; None where it is fine."""
        if "Traceback (most recent call last)" in self.said:
            return "traceback"
        if self.code == -signal.SIGKILL:
            return f"not ended within {TIMEOUT_S} s"
        return None if self.code in DOCUMENTED else f"exit code {self.code}"

    @property
    def kind(self) -> str:
        """The place of a traceback: its last two lines of code and the exception's class."""
        lines = [line.strip() for line in self.said.splitlines()]
        places = [
            line.partition(", in ")[0].rpartition("/")[2] + line.partition(", in ")[2]
            for line in lines
            if line.startswith("File ")
        ]
        ours = [line for line in lines if line.startswith("File ") and "/rafce_ray/" in line]
        last = next((line for line in reversed(lines) if line and not line.startswith(("File ", "^", "~"))), "")
        return f"{' '.join(ours[-1].split('/')[-1:]) if ours else ' '.join(places[-1:])}: {last[:100]}"


class Cases:
    """Makes the cases of one seed, each in a copy of the ``world``: a folder with all that :data:`COMMANDS` name."""

    def __init__(self, world: Path, seed: int, verbs: Sequence[str] = ()) -> None:
        self._world = world
        self._seed = seed
        self._commands = [command for command in COMMANDS if not verbs or command[0] in verbs]

    def make(self, number: int, folder: Path) -> Case:
        """Case ``number`` of this seed in the new ``folder``."""
        chance = random.Random(f"{self._seed}/{number}")
        copy_world(self._world, folder)
        case = Case(number, list(self._commands[number % len(self._commands)]))
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            change = chance.choice((change_argument, change_environment, *[change_file] * 4))
            change(case, folder, chance)
        return case


def copy_world(world: Path, folder: Path) -> None:
    """A copy whose large files are shared: changes replace a file, and so do the commands."""

    def copy(source: str, target: str) -> str:
        if os.path.getsize(source) > 100_000:
            os.link(source, target)
            return target
        return shutil.copy2(source, target)

    shutil.copytree(world, folder, copy_function=copy, symlinks=True)


def change_argument(case: Case, folder: Path, chance: random.Random) -> None:
    """Drop, double, replace or swap arguments, or add one."""
    argv, number = case.argv, chance.randrange(1, len(case.argv)) if len(case.argv) > 1 else 0
    match chance.choice(("drop", "double", "replace", "value", "value", "add", "add", "swap")):
        case "drop" if number:
            del argv[number]
        case "double":
            argv.insert(number, argv[number])
        case "replace" if number:
            argv[number] = chance.choice(STRANGE)
        case "value" if "=" in argv[number]:
            argv[number] = argv[number].partition("=")[0] + "=" + chance.choice(STRANGE)
        case "swap" if len(argv) > 2:
            other = chance.randrange(1, len(argv))
            argv[number], argv[other] = argv[other], argv[number]
        case _:
            argv.append(f"{chance.choice(KEYS)}={chance.choice(STRANGE)}")
    case.changes.append("arguments")


def change_environment(case: Case, folder: Path, chance: random.Random) -> None:
    """Give a variable that the command or a library reads a strange value."""
    name = chance.choice(VARIABLES)
    case.environment[name] = chance.choice([value for value in STRANGE if "\0" not in value])
    case.changes.append(f"{name}={case.environment[name]!r}")


def change_file(case: Case, folder: Path, chance: random.Random) -> None:
    """Change a file or folder that the command names, or one below it."""
    named = [
        folder / word.rpartition("=")[2] for word in case.argv[1:] if word.rpartition("=")[2] not in ("", ".", "/")
    ]
    named = [
        path
        for path in named
        if len(path.name) < 200
        and "\0" not in str(path)
        and os.path.lexists(path)
        and path.is_relative_to(folder)
        and path != folder
    ]
    if not named:
        return
    chosen = chance.choice(named)
    if chosen.is_dir() and not chosen.is_symlink():
        below = sorted(path for path in chosen.rglob("*") if "images" not in path.parts or chance.random() < 0.05)
        chosen = chance.choice(below or [chosen])
    change = chance.choice(
        (
            remove,
            truncate,
            empty,
            garble,
            as_folder,
            as_loop,
            as_dangling,
            as_pipe,
            rename,
            not_utf8,
            values,
            values,
            values,
        )
    )
    if not chosen.is_file() and change in (truncate, empty, garble, not_utf8, values):
        change = remove
    if change is as_pipe and chosen.suffix not in (".jpg", ".png"):
        # A file that is named may well be a pipe, and is waited for.
        change = as_folder
    case.changes.append(f"{change.__name__} {chosen.relative_to(folder)}")
    change(chosen, chance)


def replace(path: Path, content: bytes) -> None:
    """Other content in a new file: the old one may be shared."""
    path.unlink()
    path.write_bytes(content)


def remove(path: Path, chance: random.Random) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    replace(path, content[: chance.randrange(len(content) + 1)])


def empty(path: Path, chance: random.Random) -> None:
    replace(path, chance.choice((b"", b"\n", b"\0" * 100, b"{}", b"[]", b"null", b"1", b'"x"')))


def garble(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(min(len(content), chance.choice((1, 3, 30)))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    replace(path, bytes(content))


def as_folder(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    path.mkdir()


def as_loop(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    path.symlink_to(path.name)


def as_dangling(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    path.symlink_to("is_not_there")


def as_pipe(path: Path, chance: random.Random) -> None:
    remove(path, chance)
    os.mkfifo(path)


def rename(path: Path, chance: random.Random) -> None:
    path.rename(
        path.parent / chance.choice(("caf\udce9.jpg", "a b", "-x", "new\nline", "~", "#", "\x1b[31m", "[1]", "x" * 250))
    )


def not_utf8(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    place = chance.randrange(len(content) + 1)
    replace(
        path,
        chance.choice(
            (content[:place] + b"\xff\xe9" + content[place:], b"\xff\xfe" + content, b"\xef\xbb\xbf" + content)
        ),
    )


def values(path: Path, chance: random.Random) -> None:
    """Of structured files: other types, missing and unknown keys, doubled and short rows."""
    content = path.read_bytes()
    try:
        text = content.decode()
        if path.suffix in (".json", ".yaml", ".yml"):
            record = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            strange_value(record, chance)
            text = json.dumps(record) if path.suffix == ".json" else yaml.safe_dump(record)
        elif path.suffix in (".jsonl", ".csv", ".txt", ".tsv"):
            lines = text.splitlines()
            number = chance.randrange(len(lines))
            if path.suffix == ".jsonl":
                record = json.loads(lines[number])
                strange_value(record, chance)
                lines[number] = json.dumps(record)
            else:
                separator = "," if path.suffix == ".csv" else " "
                cells = lines[number].split(separator)
                cells[chance.randrange(len(cells))] = chance.choice(STRANGE)
                lines[number] = separator.join(cells)
            text = "\n".join(lines) + "\n"
        content = text.encode(errors="surrogateescape")
    except (ValueError, IndexError, yaml.YAMLError):
        content = content[::-1]
    replace(path, content)


def strange_value(record: object, chance: random.Random) -> None:
    """Replace, remove or add one value somewhere in it."""
    places: list[tuple[dict | list, object]] = []

    def look(value: object) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            places.append((value, key))
            look(item)

    look(record)
    if not places:
        return
    holder, key = chance.choice(places)
    match chance.choice(("replace", "replace", "remove", "add")):
        case "remove":
            del holder[key]
        case "add" if isinstance(holder, dict):
            holder["unknown key"] = 1
        case _:
            holder[key] = chance.choice(
                (None, True, -1, 0, 1.5, 1e308, float("nan"), "", "x", [], {}, [1], {"a": 1}, "1", 10**30)
            )


def run(case: Case, folder: Path) -> Outcome:
    """Run it in a fork of this process."""
    said = folder.with_suffix(".said")
    child = os.fork()
    if child == 0:
        os._exit(_in_child(case, folder, said))
    end = time.monotonic() + TIMEOUT_S
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return Outcome(case, os.waitstatus_to_exitcode(status), said.read_text(errors="replace"))


def _in_child(case: Case, folder: Path, said: Path) -> int:
    os.setpgid(0, 0)
    os.chdir(folder)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    encoding = "ascii" if case.environment.get("PYTHONIOENCODING") or case.environment.get("LC_ALL") else "utf-8"
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), encoding, errors="strict", write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), encoding, errors="backslashreplace", write_through=True)
    os.environ.update(case.environment)
    if case.argv[:1] == ["monitor"]:
        # It would run Prometheus until Ctrl-C.
        os.environ["PATH"] = ""
    sys.argv = ["rafce", *case.argv]
    from rafce_ray import cli
    from rafce_ray.base import console

    console.console.file = sys.stderr
    stop_before_ray()
    try:
        code = cli.main(case.argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 2
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def stop_before_ray() -> None:
    """End the process where it would start Ray, or programs that watch it."""
    import ray

    def reached(*_: object, **__: object) -> None:
        sys.stdout.flush()
        os._exit(REACHED_RAY)

    ray.init = reached


def run_all(world: Path, seed: int, numbers: Sequence[int], verbs: Sequence[str] = ()) -> Iterator[Outcome]:
    """The outcomes of these cases, in order."""
    # A fork has none of OpenMP's threads, and would wait for them.
    os.environ["OMP_NUM_THREADS"] = "1"
    # What every case needs is imported once, before the forks.
    import rafce_ray.bundle.bundle
    import rafce_ray.bundle.engines
    import rafce_ray.bundle.model
    import rafce_ray.registry.promotion
    import rafce_ray.report.page
    import rafce_ray.report.study_page
    import rafce_ray.run.compare
    import rafce_ray.serve.deployment
    import rafce_ray.serve.launch
    import rafce_ray.train.launch
    import rafce_ray.tune.ablation
    import rafce_ray.tune.launch  # noqa: F401

    cases = Cases(world, seed, verbs)
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        for number in numbers:
            folder = Path(place) / str(number)
            outcome = run(cases.make(number, folder), folder)
            shutil.rmtree(folder, ignore_errors=True)
            yield outcome


def make_world(world: Path) -> None:
    """What the commands name, made by the commands themselves: some minutes, the first time."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    small = [
        "model.backbone=mobilenet_v3_small",
        "model.weights=none",
        "model.image_px=32",
        "optim.epochs=2",
        "optim.batch_size=16",
    ]
    small += ["run.use_gpu=false", "run.precision=fp32", "optim.gap_images=32"]
    make = world.with_suffix(".making")
    make.mkdir(parents=True)

    def command(*argv: str) -> None:
        subprocess.run([sys.executable, "-m", "rafce_ray", *argv], cwd=make, env=environment, check=True)

    command("data", "synthesize", "--out", "faces", "--num-images", "160")
    write_files(make, small)
    command("train", "data.root=faces", "run.name=tiny", *small)
    command("tune", "--config", "study.yaml")
    shutil.copytree(make / "runs" / "tiny" / "bundle", make / "bundle")
    for version in ("first", "second"):
        gone_by = ("--force", "--why", "a test", "--engine", "torch")
        command("bundle", "promote", "registry", "bundle", "--as", version, *gone_by)
    with (make / "key").open("w") as key:
        subprocess.run(
            [sys.executable, "-m", "rafce_ray.service.keys", "new", "a", "--file", "keys.json"],
            cwd=make,
            stdout=key,
            check=True,
        )
    make.rename(world)


def write_files(world: Path, small: Sequence[str]) -> None:
    """Configurations, photographs, a table of labels and slices."""
    from PIL import Image

    nested: dict[str, dict[str, object]] = {"data": {"root": "faces"}}
    for word in small:
        key, _, value = word.partition("=")
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = yaml.safe_load(value)
    (world / "run.yaml").write_text(yaml.safe_dump(nested))
    study = {
        "name": "study",
        "storage": "runs",
        "base": nested,
        "search": "random",
        "num_trials": 2,
        "finalists": {"k": 1, "seeds": 2},
        "scheduler": {"type": "asha", "grace_period": 1},
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}},
    }
    (world / "study.yaml").write_text(yaml.safe_dump(study))
    (world / "ray").mkdir()
    images = sorted((world / "faces").rglob("*.jpg"))[:30]
    (world / "photos").mkdir()
    (world / "table" / "images").mkdir(parents=True)
    rows = ["name,split,emotion,AU1,AU12"]
    for number, path in enumerate(images, start=1):
        shutil.copy(path, world / "table" / "images" / f"{number:04d}.jpg")
        split = ("train", "train", "train", "validation", "test")[number % 5]
        rows.append(
            f"{number:04d}.jpg,{split},{('smiling', 'neutral')[number // 5 % 2]},{number % 2},{number // 2 % 2}"
        )
    (world / "table" / "labels.csv").write_text("\n".join(rows) + "\n")
    for number, path in enumerate(images[:3], start=1):
        Image.open(path).save(world / "photos" / f"{number:04d}.{'png' if number == 2 else 'jpg'}")
    (world / "slices.csv").write_text("name,age\n" + "".join(f"{n:04d}.jpg,{n % 60}\n" for n in range(1, 161)))
    nodes = [{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]
    (world / "ray" / "prom_metrics_service_discovery.json").write_text(json.dumps(nodes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: with --cases 1 the case itself")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default="", help="only these, with commas")
    parser.add_argument(
        "--world", type=Path, default=Path(tempfile.gettempdir()) / "rafce_fuzz_world", help="made if it is not there"
    )
    parser.add_argument("--show", type=int, default=1, help="faults shown of each kind")
    parser.add_argument("--said", type=Path, help="write what each case said, a JSON line a case")
    arguments = parser.parse_args()
    if not arguments.world.exists():
        make_world(arguments.world)
    verbs = [verb for verb in arguments.verbs.split(",") if verb]
    kinds: Counter[str] = Counter()
    codes: Counter[int] = Counter()
    begin = time.monotonic()
    numbers = range(arguments.first, arguments.first + arguments.cases)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(arguments.said.open("w")) if arguments.said else None
        for outcome in run_all(arguments.world, arguments.seed, numbers, verbs):
            codes[outcome.code] += 1
            if log:
                log.write(
                    json.dumps(
                        {"case": vars(outcome.case), "code": outcome.code, "fault": outcome.fault, "said": outcome.said}
                    )
                    + "\n"
                )
            if outcome.fault:
                kind = f"{outcome.case.argv[0] if outcome.case.argv else ''}: {outcome.fault}: {outcome.kind}"
                kinds[kind] += 1
                if kinds[kind] <= arguments.show:
                    print(
                        f"\ncase {outcome.case.number}: {outcome.case.argv} "
                        f"{outcome.case.changes}\n{outcome.said[-1500:]}",
                        flush=True,
                    )
            done = outcome.case.number - arguments.first + 1
            if done % 100 == 0:
                left = (time.monotonic() - begin) / done * (arguments.cases - done)
                print(
                    f"{done}/{arguments.cases} cases, {sum(kinds.values())} faults, {left / 60:.0f} min left",
                    file=sys.stderr,
                    flush=True,
                )
    print(
        f"\n{arguments.cases} cases of seed {arguments.seed}: exit codes {dict(sorted(codes.items()))}; "
        f"faults: {sum(kinds.values())}"
    )
    for kind, count in kinds.most_common():
        print(f"{count:5} {kind}")
    return 1 if kinds else 0


if __name__ == "__main__":
    raise SystemExit(main())
