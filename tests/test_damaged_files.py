"""Files of a run or a study that were cut short: named with the reason and a remedy that works when pasted, and done
without where possible.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rafce_ray.base.errors import DamagedFile
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.cli.compare import main as compare
from rafce_ray.cli.doctor import main as doctor
from rafce_ray.cli.report import main as report
from rafce_ray.cli.trials import main as trials
from rafce_ray.config import config_hash
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.state import Job
from rafce_ray.run.watch import RunWatch
from rafce_ray.study.config import build_study, study_yaml
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.on_test import TEST_FILE
from rafce_ray.study.trials import RungEntry, TrialPlan, read_rungs, write_rungs
from rafce_ray.tune.launch import ELAPSED_FILE, read_elapsed

REMEDY = re.compile(r"(?<=: )(?:rm|sed -i) .+$", re.MULTILINE)


@pytest.fixture
def run(trained_run, tmp_path) -> RunFolder:
    shutil.copytree(trained_run[0], tmp_path / "runs" / "tiny")
    return RunFolder(str(tmp_path / "runs" / "tiny"))


@pytest.fixture
def study(trained_run, tmp_path) -> StudyFolder:
    """A study of two trials that have ended."""
    study = StudyFolder(str(tmp_path / "study"))
    study.claim({"kind": "tune", "may_grow": {}})
    settings = build_study({"name": "study", "num_trials": 2, "space": {"optim.lr": {"choice": [0.001, 0.01]}}})
    (study.location / "study.yaml").write_bytes(study_yaml(settings).encode())
    for number in range(2):
        folder = study.trial(f"trial_{number:04d}")
        shutil.copytree(trained_run[0], folder.place, ignore=shutil.ignore_patterns("bundle", "checkpoints"))
        config = folder.config()
        job = Job(config, "store", make_taxonomy(("happy", "sad"), (1, 12)), folder.place, {})
        TrialPlan(folder.location.name, number, "sweep", {}, config_hash(config), 1, 0).write(study, job)
    write_rungs(study, [RungEntry("trial_0000", 0, 1.0, 1, 0.5, None, "continue")] * 2)
    return study


def cut(file: Path) -> None:
    """What a full disk or a broken copy leaves."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def paste(said: str) -> None:
    subprocess.run(REMEDY.search(said)[0], shell=True, check=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b'{"a": 1', "no JSON at line 1, column 8"),
        (b"[1]", "it holds a list, expected an object"),
        (b'{"b": 1}', "'a' is missing"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
    ],
)
def test_a_record_is_an_object_with_its_keys_or_the_reason_is_told(content, reason, tmp_path):
    file = locate(tmp_path / "a file.json")
    with pytest.raises(FileNotFoundError):
        file.read_record("")
    file.write_bytes(content)
    with pytest.raises(DamagedFile) as caught:
        file.read_record("It comes again.", keys=("a",))
    assert str(caught.value) == (
        f"{file.shown}: is cut short or altered: {reason}. Remove it: rm '{file.shown}'\nIt comes again."
    )
    paste(str(caught.value))
    assert not file.exists()


def test_of_lines_only_the_last_may_be_cut_short(tmp_path):
    file = locate(tmp_path / "lines.jsonl")
    assert file.read_records("") == []
    file.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert file.read_records("") == [{"a": 1}, {"a": 2}]
    file.write_bytes(b'{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(DamagedFile, match="line 2 is cut short or altered") as caught:
        file.read_records("The others stay.")
    paste(str(caught.value))
    assert file.read_records("") == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("name", ["config.yaml", "result.json", "provenance.json", "outputs_validation.parquet"])
def test_a_file_that_a_run_depends_on_is_named_with_the_way_on(name, run, capsys):
    cut(Path(run.place) / name)
    assert doctor([run.place]) == 1
    said = capsys.readouterr().err
    assert f"{run.location.shown}/{name}: is cut short or altered" in said
    paste(said)
    assert not (run.location / name).exists()
    if name == "config.yaml":
        assert not run.exists(), "the same command starts it again, from its checkpoints"
    else:
        assert doctor([run.place]) == (2 if name == "provenance.json" else 0), capsys.readouterr().err


def test_a_configuration_cut_at_a_section_is_not_filled_up_with_defaults(run):
    file = Path(run.place) / "config.yaml"
    file.write_text(file.read_text().partition("optim:")[0])
    with pytest.raises(DamagedFile, match=r"config.yaml: is cut short or altered: section 'optim' is missing"):
        run.config()


@pytest.mark.parametrize("name", ["audit.json", "targets.json", "progress.json", "bundle/bundle.json"])
def test_a_run_does_without_a_file_on_which_nothing_depends(name, run, capsys):
    file = Path(run.place) / name
    file.write_bytes(b'{"epoch')
    assert doctor([run.place]) == 0
    said = capsys.readouterr().err
    assert ("is cut short or altered" in said) == (name != "progress.json")
    with RunWatch(run, run.config()):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_damaged_line_is_named_and_the_others_stay(name, run, capsys):
    file = Path(run.place) / name
    first, _, rest = file.read_text().partition("\n")
    file.write_text(first[:9] + "\n" + rest)
    assert doctor([run.place]) == 1
    said = capsys.readouterr().err
    assert f"{name}: line 1 is cut short or altered: no JSON at" in said
    paste(said)
    assert doctor([run.place]) == 0


@pytest.mark.parametrize("name", ["trial.json", "result.json", "metrics.jsonl"])
def test_listings_and_reports_do_without_a_trial_that_cannot_be_read(name, study, capsys):
    file = Path(study.trial("trial_0001").place) / name
    file.write_bytes(b'{"epoch": \n' + file.read_bytes())
    for command in (trials, report, *([doctor] if name != "trial.json" else [])):
        assert command([study.place]) == 0, command
        said = capsys.readouterr()
        assert "trial_0001 is left out" in said.err
        assert f"trial_0001/{name}: " in said.err
    assert trials([study.place, "--json"]) == 0
    assert "trial_0000" in (listed := capsys.readouterr().out)
    assert "trial_0001" not in listed


@pytest.mark.parametrize("name", ["finalists.json", TEST_FILE])
def test_a_studys_report_does_without_a_verdict_that_cannot_be_read(name, study, capsys):
    (study.location / name).write_bytes(b'{"metric": ')
    assert report([study.place]) == 0
    assert f"{name}: is cut short or altered: no JSON at line 1, column 12. Remove it: rm " in capsys.readouterr().err


@pytest.mark.parametrize("command", [trials, report])
def test_settings_of_a_study_that_cannot_be_read_are_named(command, study, capsys):
    (study.location / "study.yaml").write_bytes(b"name: [")
    assert command([study.place]) == 1
    assert "study.yaml: is cut short or altered" in capsys.readouterr().err


def test_a_study_goes_on_once_what_is_damaged_is_removed(study):
    cut(Path(study.place) / "study.json")
    with pytest.raises(DamagedFile, match=r"study.json: is cut short or altered") as caught:
        study.claim({"kind": "tune", "may_grow": {}})
    paste(str(caught.value))
    study.claim({"kind": "tune", "may_grow": {}})
    (study.location / ELAPSED_FILE).write_bytes(b"{")
    with pytest.raises(DamagedFile, match=ELAPSED_FILE) as caught:
        read_elapsed(study)
    paste(str(caught.value))
    assert read_elapsed(study) == 0.0
    file = Path(study.place) / "rungs.jsonl"
    file.write_text('{"trial"\n' + file.read_text())
    with pytest.raises(DamagedFile, match=r"rungs.jsonl: line 1") as caught:
        read_rungs(study)
    paste(str(caught.value))
    assert len(read_rungs(study)) == 2


def test_compared_runs_are_named_too(run, capsys):
    cut(Path(run.place) / "result.json")
    assert compare([run.place, run.place]) == 1
    assert "result.json: is cut short or altered" in capsys.readouterr().err
