"""The model that answers: replaced by a good one, never by a bad one, and never while somebody still uses it."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from rafce_ray.base.errors import GateError, RafceError, UsageError
from rafce_ray.bundle.bundle import MANIFEST, WEIGHTS, BundleError, load_bundle
from rafce_ray.service.config import ServiceConfig, read_service_config
from rafce_ray.service.live import LiveModel, Served, Source, Target, load_served
from rafce_ray.service.meter import Meter


@pytest.fixture(scope="module")
def good(write_bundle, tmp_path_factory) -> tuple[Path, Path]:
    """Two bundles of one taxonomy."""
    folder = tmp_path_factory.mktemp("good")
    return write_bundle(folder / "one"), write_bundle(folder / "two", seed=1)


@pytest.fixture(scope="module")
def other_taxonomy(write_bundle, tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("other") / "bundle", emotions=("glad", "sad"))


def replaced(place: Path, bundle: Path) -> None:
    """The folder's bundle exchanged for another at once, as a careful operator does it."""
    beside = place.with_name("beside")
    shutil.copytree(bundle, beside)
    place.rename(place.with_name(f"old{time.monotonic_ns()}"))
    beside.rename(place)


def cut_short(bundle: Path) -> None:
    weights = bundle / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])


def altered(bundle: Path) -> None:
    weights = bundle / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))


def diverged(bundle: Path) -> None:
    """NaN in the weights, whose sha256 is right."""
    weights = bundle / WEIGHTS
    tensors = safetensors.torch.load(weights.read_bytes())
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    with_weights(bundle, tensors)


def with_weights(bundle: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The bundle with other weights and their right sha256."""
    content = safetensors.torch.save(tensors)
    (bundle / WEIGHTS).write_bytes(content)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def of_another_training(bundle: Path) -> None:
    """Finite weights of the right shapes that do not give the stored answers."""
    tensors = safetensors.torch.load((bundle / WEIGHTS).read_bytes())
    tensors["emotion_head.flat.weight"] += 0.1 * torch.arange(4)[:, None]
    with_weights(bundle, tensors)


def without_manifest(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()


@pytest.fixture
def place(good, tmp_path) -> Path:
    shutil.copytree(good[0], tmp_path / "served")
    return tmp_path / "served"


@pytest.fixture
def config(place) -> ServiceConfig:
    return read_service_config({"bundle": str(place), "engine": "torch", "max_batch_faces": 2})


@pytest.fixture
def meter() -> Meter:
    return Meter()


def counts(meter: Meter) -> tuple[float | None, float | None]:
    """How often another model took over, and how often one was refused."""
    names = ("rafce_serve_swaps_total", "rafce_serve_refused_versions_total")
    swaps, refused = (meter.registry.get_sample_value(name) for name in names)
    return swaps, refused


@pytest.fixture
def live(place, config, meter) -> Iterator[LiveModel]:
    """A live model that looks only when it is told to."""
    live = LiveModel(Source(str(place), None), partial(load_served, config=config), watch_s=3600, meter=meter)
    yield live
    live.close()


def test_it_tells_who_answers(live, good):
    served = live.served
    sha256 = load_bundle(good[0]).weights_sha256
    assert (served.model.name, served.model.version, served.model.sha256) == ("rafce", sha256[:12], sha256)
    assert served.card == "# Model card: a test"
    assert served.predictor.engine.name == "torch"
    assert live.failed is None


def test_a_new_bundle_takes_over_and_who_holds_the_old_one_keeps_it(live, meter, place, good, faces):
    before = live.served
    old = before.predictor.probabilities(faces(2))
    replaced(place, good[1])
    after = live.refresh()
    assert after is live.served
    assert after.model.sha256 == load_bundle(good[1]).weights_sha256 != before.model.sha256
    assert after.since >= before.since
    np.testing.assert_array_equal(before.predictor.probabilities(faces(2)).emotion, old.emotion)
    assert np.abs(after.predictor.probabilities(faces(2)).emotion - old.emotion).max() > 1e-3
    assert counts(meter) == (1, 0)


def test_nothing_is_loaded_where_nothing_changed(live):
    before = live.served
    assert live.refresh() is before


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut_short, "cut short"),
        (altered, "was altered"),
        (diverged, "NaN or infinite"),
        (of_another_training, "does not answer as when it was saved"),
        (without_manifest, "no bundle"),
    ],
)
def test_a_bad_bundle_is_refused_and_the_old_one_goes_on(live, meter, place, good, tmp_path, spoil, reason, faces):
    before = live.served
    bad = shutil.copytree(good[1], tmp_path / "bad")
    spoil(bad)
    replaced(place, bad)
    with pytest.raises(BundleError, match=reason):
        live.refresh()
    assert live.served is before
    assert np.isfinite(live.served.predictor.probabilities(faces(1)).emotion).all()
    # Where there is no bundle at all, there is none to refuse.
    refused = int(spoil is not without_manifest)
    assert counts(meter) == (0, refused)
    replaced(place, good[1])
    assert live.refresh() is not before
    assert live.failed is None


def test_another_taxonomy_is_refused_unless_forced(live, place, other_taxonomy):
    before = live.served
    replaced(place, other_taxonomy)
    with pytest.raises(GateError, match="The emotions are glad, sad; the live version's are"):
        live.refresh()
    assert live.served is before
    assert live.failed is not None
    assert "glad" in live.failed.reason


class Versions:
    """A source of named versions, as a registry is one."""

    def __init__(self, versions: dict[str, Path]) -> None:
        self.versions, self.live, self.force = versions, next(iter(versions)), False

    def look(self) -> Target:
        return replace(self.find(self.live), force=self.force)

    def find(self, version: str) -> Target:
        if version not in self.versions:
            raise UsageError(f"there is no version {version!r}.")
        return Target(version, str(self.versions[version]), version)


@pytest.fixture
def versions(good, other_taxonomy) -> Versions:
    return Versions({"1": good[0], "2": good[1], "3": other_taxonomy})


@pytest.fixture
def live_of_versions(versions, config) -> Iterator[LiveModel]:
    live = LiveModel(versions, partial(load_served, config=config), watch_s=0.01)
    yield live
    live.close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_follows_its_source_by_itself(live_of_versions, versions):
    assert live_of_versions.served.model.version == "1"
    versions.live = "2"
    until(lambda: live_of_versions.served.model.version == "2")
    versions.live = "1"
    until(lambda: live_of_versions.served.model.version == "1")


def test_what_it_refuses_is_told_until_the_source_says_something_good(live_of_versions, versions):
    versions.live = "3"
    until(lambda: live_of_versions.failed is not None)
    assert (live_of_versions.failed.version, live_of_versions.served.model.version) == ("3", "1")
    versions.live = "1"
    until(lambda: live_of_versions.failed is None)
    versions.live = "none"
    until(lambda: live_of_versions.failed is not None)
    assert "no version 'none'" in live_of_versions.failed.reason
    versions.live, versions.force = "3", True
    until(lambda: live_of_versions.served.model.version == "3")
    assert live_of_versions.failed is None


def test_a_refused_version_is_not_loaded_again_and_again(versions, config):
    loaded = []

    def load(target: Target) -> Served:
        loaded.append(target.version)
        return load_served(target, config)

    live = LiveModel(versions, load, watch_s=0.005)
    versions.live = "3"
    until(lambda: live.failed is not None)
    time.sleep(0.1)
    live.close()
    assert loaded == ["1", "3"]


def test_a_version_that_was_asked_for_stays_until_the_source_is_followed_again(live_of_versions, versions):
    assert live_of_versions.switch("2").model.version == "2"
    versions.live = "3"
    time.sleep(0.1)
    assert live_of_versions.served.model.version == "2"
    with pytest.raises(GateError):
        live_of_versions.switch("3")
    versions.live = "none"
    with pytest.raises(RafceError, match="no version 'x'"):
        live_of_versions.switch("x")
    with pytest.raises(RafceError, match="no version 'none'"):
        live_of_versions.refresh()
    assert live_of_versions.served.model.version == "2"


def test_a_folder_has_no_versions(live):
    with pytest.raises(UsageError, match="Serve a registry"):
        live.switch("2")


def test_the_old_model_answers_while_the_new_one_is_loaded(versions, config):
    loading, go = threading.Event(), threading.Event()

    def load(target: Target) -> Served:
        if target.version == "2":
            loading.set()
            assert go.wait(20)
        return load_served(target, config)

    live = LiveModel(versions, load, watch_s=0.005)
    versions.live = "2"
    assert loading.wait(20)
    assert live.served.model.version == "1"
    go.set()
    until(lambda: live.served.model.version == "2")
    live.close()
