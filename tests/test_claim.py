"""Who may work in a folder: one program at a time, anyone who comes after one that died, and one kind of thing a
folder.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import running

from rafce_ray.base import claim
from rafce_ray.base.claim import SILENT_S, check_unclaimed, claimed
from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import Location, locate

HOLDER = """
import sys, time
from rafce_ray.base.claim import claimed
from rafce_ray.base.storage import locate
with claimed(locate(sys.argv[1]), "run", key="run.name"):
    print("held", flush=True)
    # A signal that comes just before a long sleep would not end it.
    while True:
        time.sleep(0.05)
"""


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request, tmp_path) -> Location:
    if request.param == "disk":
        return locate(tmp_path / "x")
    return locate(request.getfixturevalue("s3_place")(f"claims-{uuid.uuid4().hex}"))


def names(folder: Location) -> list[str]:
    return [info.base_name for info in folder.list()]


def held_by(folder: Location, *, silent_s: float = 0.0, **holder) -> Location:
    """The claim of another program, whose last sign of life is so old."""
    record = {"host": "elsewhere", "machine": "another", "pid": 4711, "started": "1", "holds": True}
    file = folder / f".claim-{uuid.uuid4().hex}.json"
    file.write_bytes(json.dumps(record | holder).encode())
    if silent_s:
        before = file.local.stat().st_mtime - silent_s
        os.utime(file.local, (before, before))
    return file


def own_record() -> dict:
    """What this process would claim with."""
    return {"host": socket.gethostname(), "machine": claim._machine(), "pid": os.getpid(), "started": "1"}


def hold(folder: Location) -> None:
    with claimed(folder, "run", key="run.name"):
        pass


def test_a_second_program_is_refused_and_the_first_leaves_nothing_behind(folder):
    with claimed(folder, "run", key="run.name"):
        (first,) = names(folder)
        refusal = f"process {os.getpid()} on this machine works in this folder now.*kill {os.getpid()}"
        with pytest.raises(UsageError, match=refusal):
            hold(folder)
        with pytest.raises(UsageError, match=refusal):
            check_unclaimed(folder)
        assert names(folder) == [first], "the one that was refused must not free it"
    assert names(folder) == []
    check_unclaimed(folder)


@contextmanager
def another_holds(folder: Location, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another program, which holds the folder."""
    argv = [sys.executable, "-c", HOLDER, str(folder)]
    with running(argv, os.environ, tmp_path / "said", stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n", (tmp_path / "said").read_text()
        yield process


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_program_holds_nothing_from_that_moment_on(reaped, tmp_path):
    folder = locate(tmp_path / "x")
    with another_holds(folder, tmp_path) as process:
        with pytest.raises(UsageError, match=f"kill {process.pid}"):
            hold(folder)
        os.kill(process.pid, signal.SIGKILL)
        # Without it, the process stays in the table until this one asks for its exit code.
        os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        with claimed(folder, "run", key="run.name"):
            assert len(names(folder)) == 1


def test_the_command_of_the_refusal_ends_the_program_which_frees_the_folder(tmp_path):
    folder = locate(tmp_path / "x")
    with another_holds(folder, tmp_path) as process:
        with pytest.raises(UsageError) as refused:
            hold(folder)
        subprocess.run(re.search(r"kill \d+", str(refused.value))[0], shell=True, check=True)
        process.wait(60)
        assert not folder.exists()
        hold(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_program_that_is_told_to_end_gives_its_claim_back(number, tmp_path):
    folder = locate(tmp_path / "x")
    with another_holds(folder, tmp_path) as process:
        process.send_signal(number)
        process.wait(60)
    assert not folder.exists()


def test_a_signal_that_is_ignored_or_handled_stays_so(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        # nohup has it ignored.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with claimed(locate(tmp_path / "x"), "run", key="run.name"):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_process_with_the_number_of_one_that_died_holds_nothing(tmp_path):
    folder = locate(tmp_path / "x")
    held_by(folder, **own_record())
    hold(folder)


def test_a_process_with_the_same_number_and_host_name_in_another_container_is_another_one(tmp_path):
    folder = locate(tmp_path / "x")
    held_by(folder, **own_record() | {"machine": "same-boot pid:[1]"})
    with pytest.raises(UsageError, match=f"on {socket.gethostname()} works in this folder now; its last sign of life"):
        hold(folder)


def test_a_program_on_another_machine_holds_the_folder_until_it_falls_silent(tmp_path):
    folder = locate(tmp_path / "x")
    file = held_by(folder, silent_s=SILENT_S - 20)
    with pytest.raises(UsageError, match=r"process 4711 on elsewhere.*give the same command again in ") as refused:
        hold(folder)
    assert 1 <= int(re.search(r"again in (\d+) s", str(refused.value))[1]) <= 20
    held_by(folder, silent_s=SILENT_S + 1)
    file.delete()
    with claimed(folder, "run", key="run.name"):
        assert len(names(folder)) == 1


def test_an_empty_folder_that_was_there_stays(tmp_path):
    (tmp_path / "x").mkdir()
    hold(locate(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}"])
def test_a_record_cut_short_holds_nothing(folder, content):
    (folder / f".claim-{uuid.uuid4().hex}.json").write_bytes(content)
    hold(folder)


def test_of_many_that_start_together_one_works_at_a_time(tmp_path):
    folder, working, seen, done = locate(tmp_path / "x"), threading.Lock(), [], threading.Event()
    start = threading.Barrier(6)

    def work() -> None:
        start.wait()
        try:
            with claimed(folder, "run", key="run.name"):
                seen.append(working.acquire(blocking=False))
                done.wait(60)
                working.release()
        except UsageError:
            refused.release()

    refused = threading.Semaphore(0)
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert refused.acquire(timeout=120)
    done.set()
    for thread in threads:
        thread.join()
    assert seen == [True]


def test_a_claim_that_was_taken_away_is_told(tmp_path, monkeypatch, capsys, until):
    monkeypatch.setattr(claim, "BEAT_EVERY_S", 0.01)
    told: list[str] = []
    monkeypatch.setattr(claim, "warn", told.append)
    folder = locate(tmp_path / "x")
    with claimed(folder, "run", key="run.name"):
        (folder / names(folder)[0]).delete()
        until(lambda: told)
    assert "claim of the folder is gone" in told[0]


def mark(name: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")

    return write


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (mark("provenance.json"), "study", "holds a run, not a study: nothing was changed"),
        (mark("study.json"), "run", "holds a study, not a run: nothing was changed"),
        (mark("plan.json"), "run", "holds predictions, not a run: nothing was changed"),
        (mark("provenance.json"), "predictions", "holds a run, not predictions: nothing was changed"),
        (mark("config.yaml"), "run", r"holds something else \(config.yaml\)"),
        (mark("bundle.json"), "run", r"holds something else \(bundle.json\)"),
        (mark("labels.csv"), "study", r"holds something else \(labels.csv\)"),
        (lambda folder: folder.write_text("a file"), "run", r"holds something else \(x\)"),
    ],
    ids=["run", "study", "predictions", "run-not-predictions", "own-config", "bundle", "labels", "file"],
)
def test_a_folder_holds_one_kind_of_thing_and_the_name_that_is_offered_is_free(make, kind, said, tmp_path):
    make(tmp_path / "x")
    (tmp_path / "x-2").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=said) as refused, claimed(locate(tmp_path / "x"), kind, key="run.name"):
        pytest.fail("it holds something else")
    assert sorted(tmp_path.rglob("*")) == before
    assert str(refused.value).endswith("run.name=x-3")
    with claimed(locate(tmp_path / "x-3"), kind, key="run.name"):
        pass


def test_an_option_is_offered_the_whole_path(tmp_path):
    mark("labels.csv")(tmp_path / "my faces")
    with pytest.raises(UsageError) as refused, claimed(locate(tmp_path / "my faces"), "predictions", key="--out"):
        pytest.fail("it holds something else")
    assert str(refused.value).endswith(f"--out {shlex.quote(locate(tmp_path / 'my faces-2').shown)}")


@pytest.mark.parametrize(
    ("kind", "there"), [("run", "provenance.json"), ("run", "audit.json"), ("study", "study.json"), ("study", "trials")]
)
def test_a_thing_of_the_same_kind_goes_on_also_where_it_was_killed_at_its_start(kind, there, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / there).touch()
    with claimed(locate(tmp_path / "x"), kind, key="run.name"):
        pass
    assert names(locate(tmp_path / "x")) == [there]


@pytest.fixture
def commands(drawn_faces, store_dir, tmp_path) -> dict[str, Callable[[], int]]:
    """Each command that trains into ``runs/x``, refused before it starts Ray or not at all."""
    from rafce_ray.cli import ablate, train, tune

    data = [f"data.root={drawn_faces}", f"data.store_dir={store_dir}", "model.image_px=32", "model.weights=none"]
    overrides = [*data, f"run.storage={tmp_path / 'runs'}", "run.name=x"]
    study = tmp_path / "study.yaml"
    study.write_text(
        f"name: x\nstorage: {tmp_path / 'runs'}\nnum_trials: 2\nspace:\n  optim.lr: {{choice: [0.001, 0.01]}}\n"
    )
    study_and_data = ["--config", str(study), *(f"base.{text}" for text in data)]
    return {
        "train": lambda: train.main(overrides),
        "train --resume": lambda: train.main([*overrides, "--resume"]),
        "tune": lambda: tune.main(study_and_data),
        "tune --dry-run": lambda: tune.main([*study_and_data, "--dry-run"]),
        "ablate": lambda: ablate.main([*overrides, "--arms", "seed_fixed"]),
    }


@pytest.mark.parametrize(
    ("name", "holds", "file"),
    [
        ("train", "a study", "study.json"),
        ("train --resume", "a study", "study.json"),
        ("train", "something else (config.yaml)", "config.yaml"),
        ("tune", "a run", "provenance.json"),
        ("tune --dry-run", "a run", "provenance.json"),
        ("ablate", "a run", "provenance.json"),
    ],
)
def test_no_command_trains_into_a_folder_of_another_kind(name, holds, file, commands, tmp_path, capsys):
    mark(file)(tmp_path / "runs" / "x")
    assert commands[name]() == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / 'runs' / 'x'} holds {holds}, not a" in said
    assert said.endswith("name=x-2")
    assert names(locate(tmp_path / "runs" / "x")) == [file]


@pytest.mark.parametrize("name", ["train", "train --resume", "tune", "ablate"])
def test_no_command_works_in_a_folder_in_which_another_one_works(name, commands, tmp_path, capsys):
    folder = locate(tmp_path / "runs" / "x")
    with claimed(folder, "study" if name in ("tune", "ablate") else "run", key="name"):
        there = names(folder)
        assert commands[name]() == 2
        assert f"process {os.getpid()} on this machine works in this folder now" in " ".join(
            capsys.readouterr().err.split()
        )
        assert names(folder) == there


def test_no_run_trains_into_a_study_that_works(commands, tmp_path, capsys):
    from rafce_ray.cli import train

    study = locate(tmp_path / "runs" / "x")
    with claimed(study, "study", key="name"):
        there = names(study)
        assert train.main([f"data.root={tmp_path}", f"run.storage={study / 'trials'}", "run.name=trial_0000"]) == 2
        assert f"{study}: process {os.getpid()} on this machine works" in " ".join(capsys.readouterr().err.split())
        assert [name for name in names(study) if name != "trials"] == there
