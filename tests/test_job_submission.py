"""`ray job submit` on a cluster of two machines: the code goes there without data, results stay, the same command goes
on.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import kill_all
from serving import free_port

from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import read_trials

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
DEADLINE_S = 150

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Path, dict[str, str]]]:
    """Two machines' worth of Ray: a head that computes nothing and a worker; its folder, and the environment of those
    who submit.
    """
    folder = Path(f"/tmp/j{os.getpid()}")
    port, dashboard = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "OMP_NUM_THREADS": "1",
    }
    # Jobs are run by the machine's python, which is this one.
    environment |= {"RAY_TMPDIR": str(folder), "PATH": f"{PROGRAMS}:{environment['PATH']}"}
    environment |= {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    # Processes of the cluster itself are told its address by their command line.
    of_nodes = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    start = [PROGRAMS / "ray", "start", "--block", "--object-store-memory=100000000"]
    head = ["--head", "--num-cpus=0", f"--port={port}", "--dashboard-host=127.0.0.1"]
    head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        # A folder each: machines do not share the one in which Ray unpacks what is uploaded.
        for name, arguments in (("head", head), ("worker", [f"--address=127.0.0.1:{port}", "--num-cpus=2"])):
            argv = [*start, *arguments, f"--temp-dir={folder / name}", f"--dashboard-agent-listen-port={free_port()}"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            nodes.append(subprocess.Popen(argv, env=of_nodes, start_new_session=True, **quiet))
            # The worker asks for a head that answers.
            wait_for(lambda: num_nodes(environment) == len(nodes), "the cluster does not start")
        yield folder, environment
    finally:
        for node in reversed(nodes):
            kill_all(node)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def ask(environment: dict[str, str], path: str) -> Any:
    """What the dashboard answers; None while it does not."""
    try:
        with urllib.request.urlopen(environment["RAY_ADDRESS"] + path, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def num_nodes(environment: dict[str, str]) -> int:
    answer = ask(environment, "/nodes?view=summary")
    return len(answer["data"]["summary"]) if answer else 0


@pytest.fixture
def checkout(tmp_path: Path, tiny_overrides: list[str]) -> Path:
    """The code with a study of two trials, and beside it what must stay: faces, runs, a photograph."""
    place = tmp_path / "checkout"
    shutil.copytree(REPOSITORY / "rafce_ray", place / "rafce_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", ".gitignore"):
        shutil.copy(REPOSITORY / name, place / name)
    for name in (
        "faces/aligned/test_0001.png",
        "runs/old/best/model.safetensors",
        "photo.jpg",
        "labels.csv",
        ".git/config",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    base: dict[str, dict[str, Any]] = {}
    for override in [*tiny_overrides, "optim.epochs=2", "optim.warmup_epochs=0"]:
        dotted, _, value = override.partition("=")
        section, _, key = dotted.partition(".")
        base.setdefault(section, {})[key] = float(value) if key == "lr" else yaml.safe_load(value)
    study = {
        "name": "study",
        "base": base,
        "space": {"optim.lr": {"grid": [1e-4]}},
        "search": "grid",
        "metric": "emotion_loss",
        "scheduler": {"type": "none"},
        "resources": {"concurrent": 1},
        "finalists": {"k": 0},
    }
    (place / "tune_configs").mkdir()
    (place / "tune_configs" / "tiny.yaml").write_text(yaml.safe_dump(study))
    return place


def job(words: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """``ray job ...`` as a person runs it in a folder."""
    return subprocess.run(
        [PROGRAMS / "ray", "job", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_a_job_uploads_no_data_keeps_its_results_and_goes_on_when_it_is_submitted_again(cluster, checkout, tmp_path):
    folder, environment = cluster
    shared = tmp_path / "shared"
    study = StudyFolder(str(shared / "study"))
    tune = ["python", "-m", "rafce_ray.tune", "--config", "tune_configs/tiny.yaml", f"storage={shared}"]
    submit = ["submit", "--working-dir", ".", "--"]
    submitted = job(["submit", "--submission-id", "first", "--no-wait", *submit[1:], *tune], environment, checkout)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    def first_trial_ended() -> bool:
        state = ask(environment, "/api/jobs/first") or {}
        assert state.get("status") != "FAILED", ask(environment, "/api/jobs/first/logs")
        return study.trial("trial_0000").result() is not None

    wait_for(first_trial_ended, "the first trial does not end")
    unpacked = [path for path in folder.glob("*/session_2*/runtime_resources/working_dir_files/*") if path.is_dir()]
    assert {path.relative_to(folder).parts[0] for path in unpacked} == {"head", "worker"}
    files = {path.relative_to(one).parts[0] for one in unpacked for path in one.rglob("*") if path.is_file()}
    assert files == {"rafce_ray", "tune_configs"}

    # Whatever ends a job: the machine, its memory, a person.
    stopped = job(["stop", "first"], environment, checkout)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    ended = [name for name in study.trial_names() if study.trial(name).result() is not None]
    before = {name: files_of(study, name) for name in ended}

    again = job([*submit, *tune], environment, checkout)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(ended)} trials have ended" in again.stdout
    # The winner was measured on the test split, too, which adds a file.
    after = {name: {file: at for file, at in files_of(study, name).items() if file in before[name]} for name in ended}
    assert after == before, "what had ended was touched"
    trials = read_trials(study, "emotion_loss")
    assert [one.status for one in trials] == ["finished"] * 2
    assert [[epoch for epoch, _ in one.curve] for one in trials] == [[1, 2]] * 2, "an epoch is told twice or never"
    assert json.loads((shared / "study" / "study.json").read_text())["kind"] == "tune"
    assert list(checkout.glob("runs/*")) == [checkout / "runs" / "old"], "results beside the code"


def files_of(study: StudyFolder, name: str) -> dict[str, float]:
    """When each file of a trial was last written."""
    folder = Path(str(study.trials / name))
    return {str(path.relative_to(folder)): path.stat().st_mtime for path in folder.rglob("*") if path.is_file()}
