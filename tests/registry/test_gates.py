"""Gates by hand-computed figures."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from rafce_ray.base.taxonomy import make_taxonomy
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.canary import draw_canary
from rafce_ray.bundle.model import Predictor
from rafce_ray.registry import gates
from rafce_ray.registry.gates import canary_gate, latency_gate, metrics_gate, taxonomy_gate


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return load_bundle(make_bundle())


def measured(bundle, figures, data="data-1"):
    return replace(bundle, metrics=figures, provenance={"data_fingerprint": data})


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [((0.5, 0.3), "passed"), ((0.4, 0.2), "passed"), ((0.4, 0.19), "refused"), ((0.1, 0.49), "refused")],
)
def test_the_score_reaches_the_lower_end_of_the_live_ones_interval(bundle, metrics, candidate, verdict):
    # The live score is 0.4 and its interval begins at 0.3.
    gate = metrics_gate(measured(bundle, metrics(*candidate)), measured(bundle, metrics(0.5, 0.3)))
    assert gate.verdict == verdict
    (one,) = gate.figures["comparisons"]
    assert one["figure"] == "score"
    assert (one["candidate"], one["live"], one["low"]) == pytest.approx((sum(candidate) / 2, 0.4, 0.3))


def test_other_data_are_said_and_do_not_pass(bundle, metrics):
    live = measured(bundle, metrics(0.5, 0.3))
    gate = metrics_gate(measured(bundle, metrics(0.9, 0.9), "data-2"), live)
    assert gate.verdict == "refused"
    assert "other data than the live version (data fingerprint data-2, live data-1)" in gate.detail
    assert "score 0.900 against 0.400" in gate.detail
    gate = metrics_gate(measured(bundle, metrics(0.9, 0.9) | {"split": "test"}), live)
    assert "split test, live validation" in gate.detail
    gate = metrics_gate(measured(bundle, metrics(0.9, 0.9, num_images=100)), live)
    assert "images 100, live 200" in gate.detail
    unknown = metrics_gate(measured(bundle, metrics(0.9, 0.9), None), measured(bundle, metrics(0.5, 0.3), None))
    assert (unknown.verdict, "data fingerprint unknown, live unknown" in unknown.detail) == ("refused", True)


def test_a_score_that_weighs_the_tasks_otherwise_is_compared_part_by_part(bundle, metrics):
    # optim.score_au_share other than 0.5: the stored score has no interval, and is another figure.
    live = metrics(0.5, 0.3)
    live |= {"score": 0.45, "intervals": live["intervals"] | {"score": [None, None]}}
    gate = metrics_gate(measured(bundle, metrics(0.9, 0.19)), measured(bundle, live))
    assert [one["figure"] for one in gate.figures["comparisons"]] == ["macro_f1_supported", "au_f1_mean"]
    assert gate.verdict == "refused"
    assert metrics_gate(measured(bundle, metrics(0.41, 0.21)), measured(bundle, live)).verdict == "passed"


def test_figures_that_are_not_there_are_not_passed_over(bundle, metrics):
    live = measured(bundle, metrics(0.5, 0.3))
    lacking = metrics_gate(measured(bundle, metrics(0.5, 0.3) | {"au_f1_mean": None}), live)
    assert (lacking.verdict, "has no AU-F1" in lacking.detail) == ("refused", True)
    no_interval = measured(bundle, metrics(0.5, 0.3) | {"intervals": {}})
    assert metrics_gate(live, no_interval).verdict == "refused"
    assert metrics_gate(live, measured(bundle, {})).verdict == "nothing to compare with"
    assert metrics_gate(live, None).verdict == "nothing to compare with"


def test_names_and_their_order_are_what_clients_rely_on(bundle):
    names = bundle.taxonomy.emotions
    assert taxonomy_gate(bundle, bundle).verdict == "passed"
    assert taxonomy_gate(bundle, None).verdict == "nothing to compare with"
    for other in (
        make_taxonomy((names[1], names[0], names[2]), (1, 12)),
        make_taxonomy(names, (12, 1)),
        make_taxonomy(names, (1,)),
    ):
        assert taxonomy_gate(replace(bundle, taxonomy=other), bundle).verdict == "refused"


def test_the_slowest_batch_decides(bundle, monkeypatch):
    monkeypatch.setattr(
        gates, "ms_per_face", lambda models: [{"1": 3.0, "8": 1.6}, {"1": 3.0, "8": 1.0}][: len(models)]
    )
    predictor = Predictor(bundle)
    slow = latency_gate(predictor, predictor, max_ratio=1.5)
    assert (slow.verdict, slow.figures["ratios"]) == ("refused", {"1": 1.0, "8": 1.6})
    assert latency_gate(predictor, predictor, max_ratio=1.6).verdict == "passed"
    alone = latency_gate(predictor, None, max_ratio=1.5)
    assert (alone.verdict, "1.60 ms a face in a batch of 8" in alone.detail) == ("nothing to compare with", True)


def test_both_models_are_measured_at_both_batch_sizes(bundle):
    found = gates.ms_per_face([Predictor(bundle), Predictor(bundle)])
    assert [sorted(one) for one in found] == [["1", "8"]] * 2
    assert all(ms > 0 for one in found for ms in one.values())


def test_an_engine_that_answers_otherwise_than_stored_is_refused(bundle):
    predictor = Predictor(bundle)
    found = canary_gate(predictor)
    assert (found.verdict, found.figures["largest_difference"]) == ("passed", pytest.approx(0, abs=1e-6))
    canary = draw_canary(bundle.model, bundle.preprocessing)
    canary.outputs.emotion[-1, 0] += 0.1
    off = SimpleNamespace(bundle=replace(bundle, canary=canary), outputs=predictor.outputs, engine=predictor.engine)
    assert canary_gate(off).verdict == "refused"
    without = SimpleNamespace(bundle=replace(bundle, canary=None), outputs=predictor.outputs, engine=predictor.engine)
    assert canary_gate(without).verdict == "nothing to compare with"
