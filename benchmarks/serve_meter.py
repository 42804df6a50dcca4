"""What the endpoint's metrics cost: microseconds on the event loop for a request of one face, and milliseconds to
publish them.

The loop's part is timed by itself, with 14 emotions and 18 action units. With `--publish` Ray is started, and a
replica's thread is timed as it publishes every series once.

  python benchmarks/serve_meter.py [--publish]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console

from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, make_taxonomy
from rafce_ray.bundle.model import ActionUnitPrediction, EmotionPrediction, Prediction
from rafce_ray.metrics.drift import Bins, DriftReference, Light, light_of
from rafce_ray.service.live import DriftWatch
from rafce_ray.service.meter import Meter

ROUNDS = 20_000
TAXONOMY = make_taxonomy(tuple(RAFCE_EMOTIONS), SEED18)
BINS = Bins(tuple(float(number) for number in range(1, 10)), (100,) * 10)
REFERENCE = DriftReference(1000, (1000, *[0] * 13), (300,) * 18, BINS, BINS, BINS)


def predictions(draw: np.random.Generator) -> list[Prediction]:
    """1,000 faces, each with a third of its action units active."""
    found = []
    for _ in range(1000):
        label = int(draw.integers(14))
        emotion = EmotionPrediction(TAXONOMY.emotions[label], label, float(draw.uniform()), False, (), ())
        active = draw.uniform(size=18) < 0.3
        units = zip(TAXONOMY.action_unit_codes, active.tolist(), strict=True)
        found.append(
            Prediction(emotion, tuple(ActionUnitPrediction(code, "", 0.5, 0.5, on) for code, on in units), None)
        )
    return found


def timed_us(work: Callable[[int], None]) -> float:
    """Microseconds of a call: the median of five rounds."""
    found = []
    for _ in range(5):
        began = time.perf_counter()
        for number in range(ROUNDS):
            work(number)
        found.append(1e6 * (time.perf_counter() - began) / ROUNDS)
    return round(statistics.median(found), 2)


def loop_costs() -> dict[str, float]:
    draw = np.random.default_rng(0)
    faces, lights = predictions(draw), [Light(*pair) for pair in draw.uniform(0, 10, (1000, 2)).tolist()]
    meter, watch = Meter(), DriftWatch(REFERENCE, TAXONOMY, "1")
    crop = draw.integers(0, 256, (112, 112, 3)).astype(np.uint8)

    def request(_: int) -> None:
        meter.count_request("/v1/predict", 200, 5.0, None)
        meter.count_times(1.0, 0.2, 4.0)

    return {
        "a request, us": timed_us(request),
        "a face, us": timed_us(lambda number: meter.count_face(faces[number % 1000])),
        "a face's drift, with the PSI of every 50 faces, us": timed_us(
            lambda number: watch.add(faces[number % 1000], lights[number % 1000])
        ),
        "a face's light, in an image thread, us": timed_us(lambda _: light_of(crop) and None),
    }


def publishing_cost() -> dict[str, float]:
    import ray
    from ray import serve

    from rafce_ray.serve.metrics import Export

    @serve.deployment
    class Replica:
        def measure(self) -> dict[str, float]:
            meter = Meter()
            meter.expect_answers(TAXONOMY.emotions, TAXONOMY.action_unit_codes)
            meter.tell_drift(dict.fromkeys(REFERENCE.counts(TAXONOMY.action_unit_codes), 0.1), 2000, 1000)
            for route in ("/v1/predict", "/v1/model", "/readyz"):
                meter.count_request(route, 200, 5.0, None)
            export = Export(lambda: meter, period_s=3600)
            took = []
            for number in range(20):
                meter.count_request("/v1/predict", 200, float(number), None)
                began = time.perf_counter()
                export.publish()
                took.append(1000 * (time.perf_counter() - began))
            return {"publishing once, ms": round(statistics.median(took), 2), "the first time, ms": round(took[0], 2)}

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        return serve.run(Replica.bind(), name="meter", route_prefix=None).measure.remote().result()
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="start Ray and time the publishing, too")
    arguments = parser.parse_args()
    found = loop_costs() | (publishing_cost() if arguments.publish else {})
    for what, value in found.items():
        Console().print(f"{what}: {value}", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
