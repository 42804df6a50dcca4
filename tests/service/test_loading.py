"""What a configuration serves: a registry's live version, or a folder's bundle, verified before it answers."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.registry.live import LiveRecord, read_live, replace_live
from rafce_ray.registry.versions import add_version, read_version
from rafce_ray.service.config import read_service_config
from rafce_ray.service.live import Source, load_served


@pytest.fixture(scope="module")
def registry(write_bundle, tmp_path_factory) -> Location:
    """Two versions, none of them live."""
    folder = tmp_path_factory.mktemp("registry")
    registry = locate(folder / "versions of faces")
    for seed, name in enumerate(("first", "second")):
        add_version(registry, str(write_bundle(folder / name, seed=seed)), name)
    return registry


def make_live(
    registry: Location,
    version: str,
    overruled: tuple[str, ...] = (),
    action: Literal["promote", "rollback"] = "promote",
) -> None:
    seen = read_live(registry)
    number = 1 if seen is None else seen.number + 1
    record = LiveRecord(
        number=number,
        action=action,
        version=version,
        sha256=str(read_version(registry, version).sha256),
        since=datetime.now(UTC),
        why="a test",
        by="a test",
        overruled=overruled,
        gates=(),
        before=(),
    )
    replace_live(registry, seen, record)


def test_a_registry_serves_what_is_live(registry):
    config = read_service_config({"registry": registry.uri, "engine": "torch", "name": "faces", "max_batch_faces": 1})
    source = Source(config.bundle, config.registry)
    with pytest.raises(RafceError, match="no version is live yet"):
        source.look()
    make_live(registry, "first")
    first = source.look()
    assert first == source.look()
    assert not first.force
    served = load_served(first, config)
    assert (served.model.name, served.model.version) == ("faces", "first")
    make_live(registry, "second", overruled=("taxonomy", "latency"))
    assert source.look().version == "second"
    assert source.look().force
    assert source.look().stamp != first.stamp
    assert source.find("first") == first
    make_live(registry, "first", action="rollback")
    assert source.look().force, "back to the names that were there before"
    with pytest.raises(UsageError, match="did you mean 'second'"):
        source.find("secnd")


def test_a_bundle_without_a_canary_is_served_and_that_is_said(bundle_path, write_bundle, tmp_path):
    config = read_service_config({"bundle": str(bundle_path), "engine": "torch", "max_batch_faces": 1})
    with_canary = load_served(Source(config.bundle, config.registry).look(), config)
    assert not any("canary" in remark for remark in with_canary.remarks)
    place = write_bundle(tmp_path / "old", with_canary=False)
    without = load_served(Source(str(place), None).look(), config)
    assert any("stores no canary" in remark for remark in without.remarks)
    assert len(without.canary.images) > 0


def test_a_run_folder_is_served_by_its_bundle(write_bundle, tmp_path: Path):
    write_bundle(tmp_path / "run" / "bundle")
    config = read_service_config({"bundle": str(tmp_path / "run"), "engine": "torch", "max_batch_faces": 1})
    assert load_served(Source(config.bundle, config.registry).look(), config).card == "# Model card: a test"


def test_a_bundle_without_a_reference_is_served_and_the_log_says_that_drift_is_unknown(
    bundle_path, write_bundle, even_reference, tmp_path, caplog
):
    config = read_service_config({"bundle": str(bundle_path), "engine": "torch", "max_batch_faces": 1})
    place = write_bundle(tmp_path / "new", drift_reference=even_reference(4, 3))
    assert load_served(Source(str(place), None).look(), config).drift.num_reference_images == 1200
    assert caplog.records == []
    assert load_served(Source(config.bundle, config.registry).look(), config).drift.psi == {}
    (told,) = caplog.records
    assert (told.levelname, "Drift is unknown" in told.getMessage()) == ("WARNING", True)
