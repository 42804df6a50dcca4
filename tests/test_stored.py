"""What released versions wrote is read, and goes on, with the same figures: ``tests/stored/make.py`` says how it was
made.

Tests chdir into the unpacked archive, whose paths are relative; its trunk is at ``~/trunk.safetensors``.
"""

import csv
import json
import math
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rafce_ray.base.storage import locate
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.writing import Shards, open_shards, read_plan
from rafce_ray.cli import main
from rafce_ray.config import load_config
from rafce_ray.data.loader import open_dataset
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import read_rungs

ARCHIVE = Path(__file__).parent / "stored" / "stored.tar.xz"
WHEN_AND_WHERE = {"images_per_s", "data_wait", "elapsed_s", "seconds", "time", "run", "run_dir", "bundle"}
"""Keys whose values differ from one training, or one folder, to the next."""

ON_THE_STORED_TRUNK = ("model.freeze_backbone=true", "model.weights=~/trunk.safetensors")
OPTIONS = (
    *("model.au_attention=true", "model.compositional_head=true", "loss.imbalance=logit_adjustment"),
    *("loss.au_loss=asymmetric", "loss.task_weighting=uncertainty", "optim.ema_decay=0.9", "data.augmentation=strong"),
)
GOLDEN = {
    "heads": (
        ON_THE_STORED_TRUNK,
        [[2.801057, 0.3993816, 13.34318, 2.604749, 0.4039445], [2.657661, 0.3860434, 10.68911, 2.569141, 0.4041262]],
    ),
    "options": (
        (*ON_THE_STORED_TRUNK, *OPTIONS),
        [[6.973988, 0.230503, 262.1434, 2.763087, 0.4139374], [5.417642, 0.1777042, 143.2629, 2.746203, 0.4508234]],
    ),
    "network": (
        ("optim.lr=1e-5",),
        [[2.639982, 0.3835598, 12.96061, 2.638442, 0.4041369], [2.622674, 0.3857388, 12.70411, 2.638011, 0.4041036]],
    ),
}
"""Overrides, and figures of two epochs: emotion loss, AU loss and gradient norm in training; both losses in validation.

Another instruction set's rounding changes them by 3e-7. At the usual learning rate of a whole network it would be 5e-5.
"""


def unpack(place: Path) -> Path:
    with tarfile.open(ARCHIVE) as packed:
        packed.extractall(place, filter="data")
    return place


@pytest.fixture(scope="module", autouse=True)
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The unpacked archive, which is also the working directory and the home."""
    place = unpack(tmp_path_factory.mktemp("stored"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place))
        yield place


@pytest.fixture
def rafce(capsys) -> Callable[..., list[dict]]:
    """``rafce(*arguments)``: the JSON objects that a command of exit code 0 prints, one a line."""

    def run(*arguments: str) -> list[dict]:
        assert main(list(arguments)) == 0, capsys.readouterr().err
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run


def expected(name: str) -> list[dict]:
    return [json.loads(line) for line in Path("expected", name).read_text().splitlines()]


def differences(found: object, wanted: object, tolerance: float, place: str = "") -> list[str]:
    """Where ``found`` lacks or contradicts something of ``wanted``; it may have more keys.

    Numbers may differ by the tolerance.
    """
    if isinstance(wanted, dict):
        lacking = [f"{place}.{key}: missing" for key in wanted if not isinstance(found, dict) or key not in found]
        both = [key for key in wanted if isinstance(found, dict) and key in found and key not in WHEN_AND_WHERE]
        return lacking + [
            line for key in both for line in differences(found[key], wanted[key], tolerance, f"{place}.{key}")
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, tolerance, f"{place}[{i}]")]
    if isinstance(wanted, float) and isinstance(found, int | float):
        return (
            []
            if math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
            else [f"{place}: {found} != {wanted}"]
        )
    return [] if found == wanted else [f"{place}: {found} != {wanted}"]


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["format_1", "format_2", "format_3", "format_4", "finished"])
def test_a_bundle_gives_the_answers_it_gave(name, rafce):
    bundle = "runs/finished" if name == "finished" else f"bundles/{name}"
    answers = expected(f"{name}.jsonl")
    images = [answer["path"] for answer in answers]
    found = rafce("predict", "--bundle", bundle, "--faces", "aligned", "--top-k", "4", "--device", "cpu", *images)
    assert len(answers) == 6
    assert differences(found, answers, 1e-6) == []


def test_older_bundles_lack_what_came_later():
    bundles = [load_bundle(f"bundles/format_{version}") for version in (1, 2, 3, 4)]
    assert [bundle.association is not None for bundle in bundles] == [False, True, True, True]
    assert [bundle.canary is not None for bundle in bundles] == [False, False, True, True]
    assert [bundle.drift_reference is not None for bundle in bundles] == [False, False, False, True]


@pytest.mark.numeric
def test_a_finished_run_is_evaluated_and_compared_as_it_was(rafce):
    evaluated = rafce("evaluate", "--json", "--bundle", "runs/finished", "--device", "cpu")
    assert differences(evaluated, expected("evaluate.json"), 1e-5) == []
    compared = rafce("compare", "--json", "runs/finished", "runs/study/trials/trial_0000")
    assert differences(compared, expected("compare.json"), 1e-5) == []


def test_a_store_has_the_faces_and_labels_that_were_put_in(stored, tmp_path):
    # A copy: other tests add stores of the newest decoder.
    (store,) = (path.parent for path in unpack(tmp_path).glob("stores/*/store.json"))
    provenance = json.loads((stored / "runs" / "finished" / "provenance.json").read_text())
    data = open_dataset(store, load_bundle("runs/finished").taxonomy, "mask")
    assert data.fingerprint == provenance["data_fingerprint"]
    assert [len(data.indices(split)) for split in ("train", "validation", "test")] == [28, 12, 12]
    with Path("faces/labels.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    for i, name in enumerate(data.names):
        assert data.taxonomy.emotions[data.targets.emotion[i]] == rows[name]["emotion"]
        known = [float(rows[name][unit] or "nan") for unit in ("AU1", "AU12", "AU25")]
        np.testing.assert_array_equal(data.targets.action_units[i], known)
        with Image.open(stored / "faces" / "images" / name) as image:
            np.testing.assert_array_equal(data.images.gather(np.array([i]))[0], np.asarray(image))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["runs/finished", "runs/interrupted", "runs/study", "runs/stopped", "runs/ablation"])
def test_runs_and_studies_are_diagnosed_and_reported(place, tmp_path, rafce):
    rafce("doctor", place)
    if place != "runs/ablation":
        rafce("report", place, "--out", str(tmp_path / "page.html"))
        assert "<html" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("name", ["study", "stopped"])
def test_trials_of_a_study_are_listed_as_they_were(name, rafce):
    wanted = expected(f"trials_{name}.json")
    assert {"trial_0000", "trial_0001"} <= {row["trial"] for row in wanted}
    assert differences(rafce("trials", "--json", "--all", f"runs/{name}"), wanted, 1e-12) == []


def test_the_rungs_of_a_study_are_read():
    entries = read_rungs(StudyFolder("runs/study"))
    assert {entry.action for entry in entries} == {"continue", "stop"}
    assert entries[0].trial == "trial_0000"


def test_the_versions_and_the_history_of_a_registry_are_told_as_they_were(rafce):
    (shown,) = expected("registry.json")
    assert [record["version"] for record in shown["history"]] == ["first", "second", "first"]
    assert differences(rafce("bundle", "show", "--json", "registry"), [shown], 1e-12) == []
    assert differences(rafce("bundle", "list", "--json", "registry"), expected("versions.json"), 1e-12) == []


@pytest.mark.slow
def test_an_ablation_that_has_ended_trains_nothing_and_finds_the_same(stored, rafce):
    place = stored / "runs" / "ablation" / "ablation.json"
    before = json.loads(place.read_text())
    command = json.loads((stored / "expected" / "commands.json").read_text())["ablate"]
    rafce(*command, "run.storage=runs", "run.name=ablation")
    assert differences(json.loads(place.read_text()), before, 1e-9) == []


@pytest.fixture
def copy(on_its_own, tmp_path, monkeypatch) -> Callable[..., None]:
    """``copy(*arguments)``: ``rafce`` as a program in an unpacked archive of the test's own, which is the working
    directory.
    """
    monkeypatch.chdir(unpack(tmp_path))
    variables = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", "rafce_ray", *arguments]
        done = subprocess.run(command, env=on_its_own | variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run


def lines(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.mark.ray
def test_an_interrupted_run_ends_with_the_figures_of_the_undisturbed(copy):
    before, undisturbed = lines("runs/interrupted/metrics.jsonl"), lines("runs/finished/metrics.jsonl")
    assert 0 < len(before) < len(undisturbed)
    copy(*json.loads(Path("expected/commands.json").read_text())["train"], "run.name=interrupted")
    resumed = lines("runs/interrupted/metrics.jsonl")
    assert differences(resumed[: len(before)], before, 0) == []
    assert differences(resumed, undisturbed, 1e-4) == []
    results = [json.loads(Path("runs", name, "result.json").read_text()) for name in ("interrupted", "finished")]
    for key in ("status", "epochs", "best_epoch", "metrics"):
        assert differences(results[0][key], results[1][key], 1e-4) == [], key


@pytest.mark.ray
def test_an_interrupted_study_decides_as_the_undisturbed(copy):
    before = lines("runs/stopped/rungs.jsonl")
    copy("tune", "--config", "study.yaml", "name=stopped")
    rungs = lines("runs/stopped/rungs.jsonl")
    assert rungs[: len(before)] == before
    assert differences(rungs, lines("runs/study/rungs.jsonl"), 1e-4) == []
    assert load_config("runs/stopped/best.yaml") == load_config("runs/study/best.yaml")


def test_finished_shards_of_predictions_are_found():
    folder = locate("predictions")
    plan = read_plan(folder)
    names = [name for shard in range(plan.num_shards) for name in Shards(folder, plan).paths(shard)]
    assert [Path(name).name for name in names] == sorted(path.name for path in Path("faces/images").iterdir())
    finished = open_shards(folder, plan.options, None, lambda: iter(names)).finished()
    assert sorted(finished) == list(range(7))
    assert sum(finished.values(), Counter()) == {"files": 52, "faces": 52, "predicted": 52}


@pytest.mark.numeric
@pytest.mark.parametrize("name", list(GOLDEN))
def test_a_tiny_run_has_the_losses_of_the_released_version(name, train, tmp_path):
    overrides, wanted = GOLDEN[name]
    train(tmp_path / "run", "optim.epochs=2", *overrides)
    found = [
        [epoch["train"][key] for key in ("emotion_loss", "au_loss", "grad_norm")]
        + [epoch["validation"][key] for key in ("emotion_loss", "au_loss")]
        for epoch in RunFolder(str(tmp_path / "run")).metrics()
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
