"""What `rafce tune` asks for before it starts anything."""

import signal
from pathlib import Path

import pytest
import yaml
from torchvision.models import MobileNet_V2_Weights

from rafce_ray.base.errors import UsageError
from rafce_ray.cli.tune import main
from rafce_ray.study.config import build_study
from rafce_ray.study.folder import StudyFolder
from rafce_ray.tune.launch import check_mlflow, weights_of
from rafce_ray.tune.scheduler import Control
from rafce_ray.tune.trials import stoppable


def build(**values):
    plain = {
        "name": "study",
        "base": {"recipe": "demo"},
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}},
        "num_trials": 5,
    }
    return build_study(plain | values)


def test_an_mlflow_that_cannot_be_used_is_told_before_any_trial_trains(tmp_path: Path):
    check_mlflow(build())
    address = f"unknown-store://{tmp_path}"
    with pytest.raises(UsageError, match=f"mlflow={address}: MLflow cannot be used there: .* Give the address"):
        check_mlflow(build(mlflow=address))


def test_weights_of_every_trial_are_looked_for(tmp_path: Path):
    folder = StudyFolder(str(tmp_path / "study"))
    base = {"model": {"weights": "none", "backbone": "resnet18"}}
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    choice = ["none", "DEFAULT", str(file)]
    assert weights_of(build(base=base, space={"model.weights": {"choice": choice}}), folder) == {}
    missing = {"model.weights": {"choice": ["none", str(tmp_path / "missing.safetensors")]}}
    with pytest.raises(UsageError, match=r"model\.weights: there is no file .*missing\.safetensors"):
        weights_of(build(base=base, space=missing), folder)
    # Each name for itself is known, but not for the other backbone.
    space = {
        "model.weights": {"choice": ["none", "IMAGENET1K_V2"]},
        "model.backbone": {"choice": ["resnet18", "resnet50"]},
    }
    with pytest.raises(UsageError, match=r"found 'IMAGENET1K_V2'; expected .* for resnet18"):
        weights_of(build(base=base, space=space, search="grid", num_trials=None), folder)


def test_a_study_keeps_what_its_first_start_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights that come into torch.hub's cache later are not those of the trials that have begun."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    study, folder = build(base={"model": {"backbone": "mobilenet_v2"}}), StudyFolder(str(tmp_path / "study"))
    assert weights_of(study, folder) == {"mobilenet_v2": "package"}
    folder.write_weights({"mobilenet_v2": "package"})
    cached = tmp_path / "hub" / "checkpoints" / MobileNet_V2_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(b"")
    assert weights_of(study, StudyFolder(str(tmp_path / "other"))) == {"mobilenet_v2": "IMAGENET1K_V2"}
    assert weights_of(study, folder) == {"mobilenet_v2": "package"}


def test_weights_that_cannot_be_there_are_refused_before_anything_starts(tmp_path: Path, drawn_faces: Path, capsys):
    file = tmp_path / "study.yaml"
    study = {"name": "study", "num_trials": 8, "space": {"model.weights": {"choice": ["none", "IMAGENET1K_V7"]}}}
    file.write_text(yaml.safe_dump(study | {"base": {"recipe": "demo", "data": {"root": str(drawn_faces)}}}))
    assert main(["--config", str(file), f"storage={tmp_path}"]) == 2
    assert "model.weights: found 'IMAGENET1K_V7'" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_every_trial_finish_its_epoch_and_a_second_one_ends_at_once(number, capsys):
    # A shell starts programs in the background with SIGINT ignored, and these tests with them.
    outside = signal.signal(number, signal.default_int_handler)
    try:
        control, before = Control(), signal.getsignal(number)
        with stoppable(control):
            signal.raise_signal(number)
            assert control.stop == "interrupted"
            assert "every trial finishes its epoch and saves" in capsys.readouterr().err
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, outside)
