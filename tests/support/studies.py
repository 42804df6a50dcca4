"""What tests read of a study's folder, and a folder with figures that a test chooses."""

import json
from pathlib import Path

import numpy as np
import yaml

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.config import config_hash, load_config
from rafce_ray.metrics.counts import Counts, summarise
from rafce_ray.run.state import Job
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import TrialPlan, best_record, conclude

TAXONOMY = make_taxonomy(("happy", "happily surprised", "sad"), (1, 12, 25))
CONFUSION = np.array([[30, 6, 4], [8, 20, 2], [5, 1, 24]])
SOFTWARE = {"torch": "2.10.0", "ray": "2.60.0"}


def results(study: StudyFolder) -> dict[str, int]:
    """When the result of each ended trial was written, ns."""
    found = {name: study.trial(name).stamp("result.json") for name in study.trial_names()}
    return {name: written for name, (size, written) in found.items() if size is not None}


class SyntheticStudy:
    """Writes a study trial by trial; ``folder`` is what is read back."""

    def __init__(self, place: Path, *, metric: str = "score", space: dict | None = None, **settings) -> None:
        self.folder, self.metric = StudyFolder(str(place)), metric
        self.settings = {
            "name": place.name,
            "storage": str(place.parent),
            "base": {"recipe": "demo", "data": {"root": "faces"}},
            "space": space or {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "model.dropout": {"uniform": [0.0, 0.6]}},
            "search": "random",
            "seed": 0,
            "num_trials": 8,
            "metric": metric,
            "scheduler": {"type": "asha", "grace_period": 1, "reduction_factor": 3, "brackets": 1},
            "finalists": {"k": 2, "seeds": 2},
            **settings,
        }
        place.mkdir(parents=True)
        (place / "study.json").write_text(json.dumps({"metric": metric, "may_grow": {}}))
        (place / "study.yaml").write_text(yaml.safe_dump(self.settings, sort_keys=False))

    def add(self, number: int, values: dict, curve: list[tuple[float, float]], **how) -> str:
        """A trial whose validation figures by epoch are ``curve``: (macro_f1_supported, au_f1_mean).

        ``how``: status (None: it has not ended), reason, of and seed (a finalist's), max_epochs, seconds_per_epoch,
        cpus, gpus.
        """
        of, seed = how.get("of"), how.get("seed", 0)
        name = f"trial_{number:04d}" if of is None else f"final_{number:04d}_seed{seed}"
        overrides = ["data.root=faces", f"optim.epochs={how.get('max_epochs', 6)}", f"optim.monitor={self.metric}"]
        overrides += [f"{key}={json.dumps(value)}" for key, value in values.items()]
        config = load_config(recipe="demo", overrides=[*overrides, f"run.seed={seed}", f"run.name={name}"])
        folder, plain = self.folder.trial(name), config.model_dump(mode="json")
        provenance = {"config": plain, "data_fingerprint": "f" * 20, "software": SOFTWARE, "seed": seed}
        role = "sweep" if of is None else "finalist"
        plan = TrialPlan(
            name, number, role, values, config_hash(config), how.get("cpus", 1.0), how.get("gpus", 0.0), of
        )
        plan.write(self.folder, Job(config, "store", TAXONOMY, folder.place, provenance))
        folder.start(config, provenance, {})
        (folder.location / "audit.json").delete()
        records = [
            self._record(epoch, point, how.get("seconds_per_epoch", 2.0)) for epoch, point in enumerate(curve, 1)
        ]
        best = best_record(records, self.metric)
        for record in records:
            record["best_epoch"] = None if best is None else best["epoch"]
        folder.write_metrics(records)
        status = how.get("status", "finished")
        if status in ("stopped_by_scheduler", "failed"):
            conclude(folder, self.metric, status, how.get("reason", "because"))
        elif status is not None:
            self._finish(name, status, records, best)
        return name

    def rungs(self, decisions: list[tuple]) -> None:
        """Write ASHA's decisions: (trial, milestone, score, cutoff, action)."""
        keys = ("trial", "milestone", "score", "cutoff", "action")
        lines = [{"bracket": 0, **dict(zip(keys, one, strict=True))} for one in decisions]
        text = "".join(json.dumps({**one, "epoch": one["milestone"]}) + "\n" for one in lines)
        self.write("rungs.jsonl", text)

    def write(self, name: str, text: str) -> None:
        """Write a file of the study."""
        (self.folder.location / name).write_bytes(text.encode())

    def _finish(self, name: str, status: str, records: list[dict], best: dict | None) -> None:
        self.folder.trial(name).write_result(
            {
                "status": status,
                "run_dir": self.folder.trial(name).place,
                "bundle": f"{name}/bundle",
                "best_epoch": best and best["epoch"],
                "weights_sha256": "0" * 64,
                "metrics": best["validation"] if best else {},
                "monitor": self.metric,
                "epochs": len(records),
                "elapsed_s": records[-1]["elapsed_s"] if records else 0.0,
            }
        )

    @staticmethod
    def _record(epoch: int, point: tuple[float, float], seconds_per_epoch: float) -> dict:
        emotion, action_units = point
        known = np.array([100, 100, 100])
        tp = np.array([20, 30, 40])
        counts = Counts(CONFUSION, tp, tp // 2, tp // 3, known - tp - tp // 2 - tp // 3, 90.0, 100, 90.0, 300)
        chosen = {
            "macro_f1": emotion,
            "macro_f1_supported": emotion,
            "au_f1_mean": action_units,
            "score": (emotion + action_units) / 2,
            "loss": 2 - emotion - action_units,
        }
        validation = summarise(counts, TAXONOMY) | chosen
        headlines = ("accuracy", "macro_f1", "macro_f1_supported", "au_f1_mean")
        return {
            "epoch": epoch,
            "lr": 1e-3,
            "au_weight": 1.0,
            "train": {"loss": 2.0 / epoch, "emotion_loss": 1.5 / epoch, "au_loss": 0.5 / epoch, "grad_norm": 1.0},
            "validation": validation,
            "train_natural": dict(validation),
            "gap": dict.fromkeys(headlines, 0.0),
            "elapsed_s": epoch * seconds_per_epoch,
            "images_per_s": 100.0,
            "data_wait": 0.01,
        }
