"""Writes ``stored.tar.xz``: what released versions of rafce_ray left on a disk, for ``tests/test_stored.py``.

Run: ``python tests/stored/make.py CHECKOUTS FOLDER``. It takes about two minutes and starts Ray. FOLDER must be new;
the archive is written next to it. ``CHECKOUTS`` has a folder for each of ``COMMITS``, made by
``git worktree add CHECKOUTS/NAME COMMIT``.

All faces are drawn. The trunk's weights are few distinct numbers in a repeating pattern, and training leaves them
alone, so that the archive is small. Files that nothing reads again (pages, TensorBoard's events, checkpoints of what
has finished) are left out.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

COMMITS = {
    "format_1": "6b8d0523dbccb0dca77f77aa275eb1afc0f13c1e",
    "format_2": "5fe9d63d010ecdda2aec0ac2b08eb247b762de7c",
    "format_3": "3a96c5b3f50b52f52cee360f3b76021d2d67d3cc",
    "released": "3e61c492dcd900ffc0ce7756d14c293579c55666",
}
ACTION_UNITS = (1, 12, 25)
CLASSES = {1: "happily disgusted", 2: "sadly fearful", 5: "sadly disgusted", 10: "angrily disgusted"}
"""The most frequent of the drawn faces' classes, by RAF-CE's numbers."""

PER_CLASS = {"train": 7, "validation": 3, "test": 3}
STORED_PX = 32
WHOLE_SECOND = 1_700_000_000
"""Modification time of the drawn faces, s: an archive keeps it exactly, and a store is found again by it."""

COMMON = [
    "data.root=faces",
    "data.store_dir=stores",
    f"data.stored_px={STORED_PX}",
    f"data.emotions=[{','.join(CLASSES.values())}]",
    f"data.action_units=[{','.join(map(str, ACTION_UNITS))}]",
    "model.backbone=mobilenet_v3_small",
    "model.image_px=32",
    "model.weights=~/trunk.safetensors",
    "model.freeze_backbone=true",
    "optim.batch_size=8",
    "optim.gap_images=8",
    "run.use_gpu=false",
    "run.precision=fp32",
    "run.cpus_per_worker=1",
]
TRAIN = [
    *("train", *COMMON, "optim.lr=1e-3", "optim.epochs=30", "optim.patience=30"),
    *("run.storage=runs", "run.keep_checkpoints=1", "run.checkpoint_every_steps=1"),
]
ABLATE = ["ablate", "--arms", "emotion-only", "--seeds", "2", "--concurrent", "1", *COMMON, "optim.epochs=2"]

STUDY = {
    "storage": "runs",
    "space": {"optim.lr": {"grid": [3e-2, 1e-6, 1e-3]}},
    "search": "grid",
    "metric": "emotion_loss",
    "scheduler": {"type": "asha", "grace_period": 1, "reduction_factor": 2},
    "resources": {"concurrent": 1},
    "finalists": {"k": 1, "seeds": 2},
    "keep": 1,
}
NOT_STORED = ("report.html", ".lock", ".svg", "ablation.md", "/finished/checkpoints", "/study/ray")
NUM_ANSWERED = 6


def main() -> None:
    checkouts, folder = (Path(name).resolve() for name in sys.argv[1:3])
    if len(sys.argv) > 3:
        write_bundle(sys.argv[3])
        return
    for name, commit in COMMITS.items():
        found = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkouts / name, text=True).strip()
        assert found == commit, f"{checkouts / name} is at {found}, expected {commit}"
    folder.mkdir(parents=True)
    os.chdir(folder)
    rafce = Rafce(checkouts / "released")
    faces(rafce)
    trunk()
    for name in COMMITS:
        again = [sys.executable, __file__, str(checkouts), str(folder), name]
        subprocess.run(again, env=os.environ | {"PYTHONPATH": str(checkouts / name)}, check=True)

    rafce(*TRAIN, "run.name=finished")
    rafce.interrupt([*TRAIN, "run.name=interrupted"], Path("runs/interrupted"), epochs=3, lacks="result.json")
    base = Path("base.yaml")
    base.write_bytes(
        rafce("train", "--print-config", *COMMON, "optim.lr=1e-3", "optim.epochs=8", "optim.warmup_epochs=0")
    )
    studies()
    rafce("tune", "--config", "study.yaml", "name=study")
    stopped = Path("runs/stopped/trials/trial_0001")
    rafce.interrupt(["tune", "--config", "study.yaml", "name=stopped"], stopped, epochs=1, lacks="../../best.yaml")
    rafce(*ABLATE, "run.storage=runs", "run.name=ablation")
    rafce("bundle", "promote", "registry", "runs/finished", "--as", "first", "--why", "the first")
    why = ["--force", "--why", "chosen by the study"]
    rafce("bundle", "promote", "registry", "runs/study/best", "--as", "second", *why)
    rafce("bundle", "rollback", "registry", "--why", "the first again")
    rafce(
        *("predict", "--ray", "--workers", "1", "--shard-files", "8", "--faces", "aligned"),
        *("--bundle", "runs/finished", "--out", "predictions", "faces/images"),
    )
    expected(rafce)
    archive(folder)


class Rafce:
    """``rafce`` of one checkout. Its words are put out; standard output is returned."""

    def __init__(self, checkout: Path) -> None:
        self.environment = os.environ | {
            "PYTHONPATH": str(checkout),
            # Ray's workers have another working directory, and find the trunk by it.
            "HOME": os.getcwd(),
            "OMP_NUM_THREADS": "1",
            "LOGNAME": "someone",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def __call__(self, *arguments: str) -> bytes:
        print("rafce", *arguments, flush=True)
        return subprocess.run(self._command(arguments), env=self.environment, stdout=subprocess.PIPE, check=True).stdout

    def interrupt(self, arguments: list[str], run: Path, *, epochs: int, lacks: str) -> None:
        """Send Ctrl-C once the run has so many epochs. ``lacks``: the file that it would have in the end."""
        print("rafce", *arguments, flush=True)
        metrics = run / "metrics.jsonl"
        program = subprocess.Popen(self._command(arguments), env=self.environment, stdout=subprocess.DEVNULL)
        while not metrics.exists() or len(metrics.read_text().splitlines()) < epochs:
            assert program.poll() is None, "it ended by itself"
            time.sleep(0.005)
        program.send_signal(signal.SIGINT)
        assert program.wait() == 130
        assert not (run / lacks).exists(), "it had finished: interrupt it earlier"

    @staticmethod
    def _command(arguments: tuple[str, ...] | list[str]) -> list[str]:
        return [sys.executable, "-m", "rafce_ray.cli", *arguments]


def faces(rafce: Rafce) -> None:
    """``faces/``: a few of 600 drawn faces at 32 px, of four classes, with their labels in one table."""
    from PIL import Image

    rafce("data", "synthesize", "--out", "drawn", "--num-images", "600", "--seed", "5")
    drawn = Path("drawn")
    emotions, units, parts = (
        dict(line.split() for line in (drawn / f"RAFCE_{name}.txt").read_text().splitlines())
        for name in ("emolabel", "AUlabel", "partition")
    )
    left = {(split, label): number for split, number in PER_CLASS.items() for label in CLASSES}
    images = Path("faces/images")
    images.mkdir(parents=True)
    rows = []
    for name in sorted(emotions):
        key = (("train", "test", "validation")[int(parts[name])], int(emotions[name]))
        if not left.get(key):
            continue
        left[key] -= 1
        tokens = {token.lstrip("LR") for token in units[name].split("+")}
        known = units[name] != "null"
        rows.append(
            {
                "name": name,
                "split": key[0],
                "emotion": CLASSES[key[1]],
                **{f"AU{unit}": int(str(unit) in tokens) if known else "" for unit in ACTION_UNITS},
            }
        )
        with Image.open(drawn / "aligned" / name.replace(".jpg", "_aligned.jpg")) as image:
            image.convert("RGB").resize((STORED_PX, STORED_PX), Image.Resampling.BOX).save(images / name, quality=85)
        os.utime(images / name, (WHOLE_SECOND, WHOLE_SECOND))
    assert not any(left.values()), f"too few were drawn: {left}"
    with Path("faces/labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shutil.rmtree(drawn)


def trunk() -> None:
    """``trunk.safetensors``: a MobileNet of weights -1, 0 and 1 times a scale, which tells one face from another."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from torchvision.models import mobilenet_v3_small

    pattern = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 0, 0, 1.0], 4099)).float()
    network = mobilenet_v3_small(weights=None)
    for layer in network.features.modules():
        if isinstance(layer, torch.nn.Conv2d):
            weight = layer.weight.data
            repeats = -(-weight.numel() // len(pattern))
            scale = 2.0 ** round(np.log2(2 / np.sqrt(weight[0].numel())))
            weight.copy_(scale * pattern.repeat(repeats)[: weight.numel()].view_as(weight))
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    pixels = np.stack(
        [np.asarray(Image.open(path).resize((32, 32))) for path in sorted(Path("faces/images").iterdir())]
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        network.train().features(images)
    for layer in network.features.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            # Few bits each.
            for statistic in (layer.running_mean, layer.running_var):
                statistic.copy_(statistic.bfloat16())
    with torch.inference_mode():
        spread = network.eval().features(images).mean((2, 3)).std(0).mean()
    print(f"the features' spread over faces is {spread:.3f}")
    state = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("features")}
    save_file({name: tensor for name, tensor in state.items() if "num_batches" not in name}, "trunk.safetensors")


def write_bundle(name: str) -> None:
    """``bundles/NAME``, written by the version that this process imports, with random heads."""
    import torch

    bundle, network, preprocess, taxonomy = map(module_then, ("bundle", "model", "preprocess", "taxonomy"))

    torch.manual_seed(1)
    emotions = ("happily surprised", "sadly angry", "happily sad", "calm")
    architecture = network.Architecture("mobilenet_v3_small", 32, len(emotions), 3, components=(None,) * len(emotions))
    model = network.build_model(architecture)
    network.load_backbone_weights(model, "trunk.safetensors")
    for head in (model.emotion_head.flat, model.au_head):
        torch.nn.init.normal_(head.weight, std=0.1)
    calibration = {"temperature": 2.0, "au_thresholds": (0.25, 0.5, 0.75)}
    newer = {"au_slopes": (1.1, 0.9, 1.0), "au_shifts": (0.1, -0.1, 0.0), "unsure_below": 0.3}
    more = {"model_card": "# Model card: a test"}
    if name == "format_1":
        newer, more = {}, {}
    else:
        more["association"] = module_then("consistency").Association(
            ((0.9, 0.5, 0.05),) * len(emotions), (0.3, 0.5, 0.4)
        )
    if name == "released":
        drift = module_then("drift")
        bins = drift.Bins((0.5,), (20, 20))
        more["drift_reference"] = drift.DriftReference(40, (10, 10, 10, 10), (20, 20, 20), bins, bins, bins)
    parts = inspect.signature(bundle.save_bundle).parameters
    assert set(more) <= set(parts)
    bundle.save_bundle(
        Path("bundles") / name.replace("released", "format_4"),
        model=model,
        architecture=architecture,
        taxonomy=taxonomy.make_taxonomy(emotions, ACTION_UNITS),
        preprocessing=preprocess.Preprocessing(STORED_PX, 32),
        calibration=bundle.Calibration(**calibration, **newer),
        metrics={"accuracy": 0.5},
        provenance={"seed": 1},
        **more,
    )


def module_then(name: str) -> ModuleType:
    """A module of the version that this process imports, by its name there: later versions may call it otherwise."""
    return importlib.import_module(f"rafce_ray.{name}")


def studies() -> None:
    """``study.yaml``, whose base is ``base.yaml``."""
    import yaml

    base = yaml.safe_load(Path("base.yaml").read_text())
    base["run"] = {"use_gpu": False, "precision": "fp32"}
    # The study's metric.
    del base["optim"]["monitor"]
    Path("study.yaml").write_text(yaml.safe_dump({"name": "study", "base": base, **STUDY}))


def expected(rafce: Rafce) -> None:
    """``expected/``: what the released version says of all that."""
    place = Path("expected")
    place.mkdir()
    shown = sorted(map(str, Path("faces/images").iterdir()))[:NUM_ANSWERED]
    bundles = [*sorted(Path("bundles").iterdir()), Path("runs/finished/bundle")]
    for bundle in bundles:
        name = bundle.name if bundle.parent.name == "bundles" else "finished"
        answers = ["--faces", "aligned", "--top-k", "4", "--device", "cpu", "--out", str(place / f"{name}.jsonl")]
        rafce("predict", "--bundle", str(bundle), *answers, *shown)
    sayings = {
        "trials_study": ["trials", "--json", "--all", "runs/study"],
        "trials_stopped": ["trials", "--json", "--all", "runs/stopped"],
        "compare": ["compare", "--json", "runs/finished", "runs/study/trials/trial_0000"],
        "registry": ["bundle", "show", "--json", "registry"],
        "versions": ["bundle", "list", "--json", "registry"],
        "evaluate": ["evaluate", "--json", "--bundle", "runs/finished", "--device", "cpu"],
    }
    for name, arguments in sayings.items():
        lines = [line for line in rafce(*arguments).decode().splitlines() if line.startswith("{")]
        (place / f"{name}.json").write_text("\n".join(lines) + "\n")
    (place / "commands.json").write_text(json.dumps({"train": TRAIN, "ablate": ABLATE}, indent=1) + "\n")


def archive(folder: Path) -> None:
    """``stored.tar.xz`` next to the folder: alike files together, each with its time."""

    def without_names(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if info.name.endswith(NOT_STORED) or info.name.startswith("./.") or "tfevents" in info.name:
            return None
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(f"{folder}.tar.xz", "w:xz", preset=9, format=tarfile.PAX_FORMAT) as packed:
        packed.add(folder, ".", filter=without_names)


if __name__ == "__main__":
    main()
