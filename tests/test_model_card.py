"""The model card: its numbers are the bundle's figures, and what is wrong with the model stands in it."""

import subprocess
import sys

import numpy as np
import pytest

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.evaluate import evaluate_outputs
from rafce_ray.bundle.model_card import model_card
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs
from rafce_ray.model.network import Architecture

TAXONOMY = make_taxonomy(("calm", "glad", "sad"), (1, 12, 45))
CALIBRATION = Calibration(1.25, (0.3, 0.6, 0.5), (1.0,) * 3, (0.0,) * 3, None)


@pytest.fixture(scope="module")
def metrics() -> dict:
    """120 images: class sad occurs twice, calm is never found, AU1 is read perfectly, AU12 never, AU45 never occurs."""
    emotion = np.array([0] * 20 + [1] * 98 + [2] * 2)
    logits = np.tile(np.array([0, 2, 1], np.float32), (120, 1))
    action_units = np.zeros((120, 3), np.float32)
    action_units[:60, 0] = action_units[40:80, 1] = 1
    au_logits = np.full((120, 3), -3, np.float32)
    au_logits[:60, 0] = 3
    split = SplitOutputs([f"{n}.jpg" for n in range(120)], emotion, action_units, Outputs(logits, au_logits))
    return {"split": "validation", **evaluate_outputs(split, TAXONOMY, CALIBRATION)}


def card(metrics: dict, **changes) -> str:
    given = {
        "taxonomy": TAXONOMY,
        "architecture": Architecture("mobilenet_v3_small", 32, 3, 3),
        "calibration": CALIBRATION,
        "metrics": metrics,
        "provenance": {"config": {"run": {"name": "tiny"}}, "data_fingerprint": "f00d", "seed": 3, "best_epoch": 2},
    }
    return model_card(**given | changes)


def rows(text: str, first: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {first} ")
    ]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_numbers_are_those_of_the_figures(metrics):
    text = card(metrics)
    # 98 of 120 right, and that is what always naming the commonest class gets.
    assert rows(text, "accuracy")[0][1:] == [
        "0.817",
        f"{metrics['intervals']['accuracy'][0]:.2f} to {metrics['intervals']['accuracy'][1]:.2f}",
        "0.817",
    ]
    glad = next(row for row in rows(text, "glad") if len(row) == 7)
    # All 120 are called glad: precision 98/120, recall 1, F1 196/218; the floor is the same.
    assert [glad[at] for at in (1, 2, 3, 5, 6)] == ["98", "0.899", "0.899", "0.817", "1.000"]
    au1, au12, au45 = (
        rows(text, name)[-1] for name in ("AU1 Inner brow raiser", "AU12 Lip corner puller", "AU45 Blink")
    )
    # Floors: 60 of 120 positive, 2p / (1 + p) = 2/3; 40 of 120: 1/2.
    assert (au1[1:5], au1[6], au1[8]) == (["60", "120", "0.667", "1.000"], "above", "0.300")
    assert (au12[1:5], au12[6]) == (["40", "120", "0.500", "0.000"], "below")
    assert au45[1:] == ["0", "120", "–", "–", "–", "–", "–", "0.500", "–"]
    assert "divided by a temperature of 1.250" in text
    assert "chose the best epoch" in section(text, "Evaluation")
    assert "`f00d`" in section(text, "Training data")


def test_what_is_wrong_with_it_stands_in_it(metrics):
    limits = section(card(metrics), "Limits and known failures")
    assert "under 10 images, whose figures mean little: sad." in limits
    assert "never gets right: calm." in limits
    assert "without a positive in the split, of which nothing is known: AU45." in limits
    assert "below the floor of always saying present: AU12." in limits
    assert "Its accuracy cannot be told apart from always naming the commonest class (81.7\xa0%)" in limits


def test_use_is_said(metrics):
    text = card(metrics)
    assert "perceived expression" in section(text, "What it is")
    assert "Article 5(1)(f)" in section(text, "Prohibited use")
    assert "Article 50(3)" in section(text, "Prohibited use")
    assert "rafce predict --bundle" in section(text, "How to use it")


def test_training_data_are_counted_and_lost_labels_told(metrics):
    def split(positives: int, images: int = 50) -> dict:
        return {
            "num_rows": images,
            "num_images": images,
            "num_null": 4,
            "num_emotion_unknown": 0,
            "classes": {"calm": 10, "glad": 30, "sad": 10},
            "action_units": {"AU1": {"known": 46, "positives": positives}},
        }

    names = ("train", "validation", "test")
    audit = {"splits": {name: split(7) for name in names}}
    same = {name: split(7) for name in names}
    lost = {name: split(0 if name == "train" else 7) for name in names}
    text = card(metrics, audit=audit, targets=same)
    assert rows(text, "train") == [["train", "50", "50", "4", "0", "50"]]
    assert rows(text, "AU1")[0] == ["AU1", "7", "7", "7"]
    assert "Training did not see" not in text
    text = card(metrics, audit=audit, targets=lost)
    assert rows(text, "AU1")[0] == ["AU1", "7 (trained on: 0)", "7", "7"]
    told = "In train the labels hold 7 positives of AU1, and training saw none of them."
    assert told in section(text, "Training data")
    assert told in section(text, "Limits and known failures")


def test_names_from_data_are_text(metrics):
    evil = "<script>|`*x*`\n# sad"
    taxonomy = make_taxonomy(("calm", "glad", evil), (1, 12, 45))
    renamed = metrics | {"per_class": [*metrics["per_class"][:2], metrics["per_class"][2] | {"emotion": evil}]}
    text = card(renamed, taxonomy=taxonomy, provenance={"config": {"run": {"name": evil}}})
    assert "<script>" not in text
    assert "&lt;script&gt;\\|\\`\\*x\\*\\` \\# sad" in text
    assert not [line for line in text.splitlines() if line.startswith("# ") and "Model card" not in line]


def test_a_bundle_of_one_task_and_one_without_figures_have_a_card(metrics):
    single = card(
        {},
        taxonomy=make_taxonomy((), (12,)),
        architecture=Architecture("resnet18", 64, 0, 1),
        calibration=Calibration.uncalibrated(1),
        provenance={},
    )
    assert "reads 1 facial action unit (AU12) from" in single
    assert "Nothing was measured." in single
    assert "temperature" not in single
    assert "| emotion |" not in single


@pytest.mark.slow
def test_training_may_import_it_without_charts_or_the_engine():
    code = "import sys, rafce_ray.bundle.model_card; print([m for m in sys.modules if m in sys.argv[1:]])"
    unwanted = ["matplotlib", "rafce_ray.run.loop", "rafce_ray.report.page", "ray"]
    done = subprocess.run([sys.executable, "-c", code, *unwanted], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
