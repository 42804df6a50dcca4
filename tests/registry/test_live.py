"""What is live changes whole or not at all, one change at a time, and the history keeps every change."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from pyarrow.fs import FSSpecHandler, PyFileSystem

from rafce_ray.base import claim
from rafce_ray.base.claim import held
from rafce_ray.base.errors import GateError, RafceError
from rafce_ray.base.storage import Location, locate
from rafce_ray.registry import live
from rafce_ray.registry.live import Gate, LiveRecord, read_history, read_live, replace_live


def record(number: int, version: str = "a", before: tuple[str, ...] = ()) -> LiveRecord:
    gate = Gate(name="latency", verdict="passed", detail="fast", figures={"candidate_ms_per_face": {"1": 0.1}})
    return LiveRecord(
        number=number,
        action="promote",
        version=version,
        sha256="0" * 64,
        since=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        why="better",
        by="someone",
        overruled=("metrics",),
        gates=(gate,),
        before=before,
    )


def claims(registry: Location) -> list[str]:
    return [info.base_name for info in registry.list() if info.base_name.startswith(".")]


@pytest.fixture(params=["local", "object store"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return locate(tmp_path / "registry")
    return Location(PyFileSystem(FSSpecHandler(fsspec.filesystem("memory"))), str(tmp_path), f"memory:/{tmp_path}")


def test_what_is_written_is_read_and_every_change_is_kept(registry):
    assert (read_live(registry), read_history(registry)) == (None, [])
    first, second = record(1), record(2, "b", before=("a",))
    replace_live(registry, None, first)
    assert (read_live(registry), read_history(registry)) == (first, [first])
    replace_live(registry, first, second)
    assert (read_live(registry), read_history(registry)) == (second, [first, second])
    assert claims(registry) == []


def test_who_was_overtaken_is_told_by_whom_and_changes_nothing(registry):
    replace_live(registry, None, record(1))
    replace_live(registry, record(1), record(2, "winner"))
    before = (registry / "live.json").read_bytes()
    with pytest.raises(GateError, match="someone made winner live meanwhile"):
        replace_live(registry, record(1), record(2, "loser"))
    with pytest.raises(GateError, match="someone made winner live meanwhile"):
        replace_live(registry, None, record(1, "loser"))
    assert (registry / "live.json").read_bytes() == before
    assert [one.version for one in read_history(registry)] == ["a", "winner"]


def test_a_change_whose_program_died_before_it_wrote_the_history_is_in_it_all_the_same(registry):
    replace_live(registry, None, record(1))
    for info in (registry / "history").list():
        registry.filesystem.delete_file(info.path)
    assert read_history(registry) == [record(1)]
    replace_live(registry, record(1), record(2, "b"))
    names = [info.base_name for info in (registry / "history").list()]
    assert names == ["000001-promote-a.json", "000002-promote-b.json"]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "Invalid JSON"), (b"{}", "number: Field required"), (b'{"surprise": 1}', "Field required")],
)
def test_a_damaged_record_is_an_error_with_its_remedy(registry, content, told):
    (registry / "live.json").write_bytes(content)
    with pytest.raises(RafceError, match=f"live.json: .*{told}.*restore it"):
        read_live(registry)


def test_one_writer_waits_for_the_other_and_is_told_who_holds_the_registry(registry, monkeypatch):
    replace_live(registry, None, record(1))
    monkeypatch.setattr(live, "PATIENCE_S", 0.1)
    with held(registry):
        with pytest.raises(RafceError, match=f"process {os.getpid()} on this machine works in this folder now"):
            replace_live(registry, record(1), record(2))
        assert read_live(registry) == record(1)
    replace_live(registry, record(1), record(2))
    assert (read_live(registry), claims(registry)) == (record(2), [])


def test_a_writer_that_took_too_long_stops_before_it_writes(registry, monkeypatch):
    monkeypatch.setattr(claim, "SILENT_S", 0.0)
    with pytest.raises(RafceError, match="Nothing was changed"):
        replace_live(registry, None, record(1))
    assert (read_live(registry), claims(registry)) == (None, [])


WRITER = """
import sys
from pathlib import Path
from datetime import UTC, datetime
from rafce_ray.base.errors import GateError
from rafce_ray.base import claim
from rafce_ray.registry.live import LiveRecord, read_live, replace_live
from rafce_ray.base.storage import locate
claim.PAUSE_S = (0.001, 0.01)
registry, name, turns = locate(sys.argv[1]), sys.argv[2], int(sys.argv[3])
won = overtaken = 0
while won < turns:
    seen = read_live(registry)
    number = 1 if seen is None else seen.number + 1
    before = () if seen is None else (seen.version, *seen.before)
    new = LiveRecord(number=number, action="promote", version=f"{name}{won}", sha256="", since=datetime.now(UTC),
        why="-", by=name,
                     overruled=(), gates=(), before=before)
    try:
        replace_live(registry, seen, new)
        won += 1
    except GateError:
        overtaken += 1
print(overtaken)
"""


def change_at_once(place: str, names: str, turns: int) -> None:
    """Programs that each make ``turns`` changes at the same time; what they leave behind is one history."""
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, place, name, str(turns)], stdout=subprocess.PIPE)
        for name in names
    ]
    told = [writer.communicate(timeout=120)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * len(names), told
    history = read_history(locate(place))
    assert [one.number for one in history] == list(range(1, len(names) * turns + 1))
    assert {one.version for one in history} == {f"{name}{turn}" for name in names for turn in range(turns)}
    # Each was made from the one before it, so none was lost.
    for one, following in pairwise(history):
        assert following.before == (one.version, *one.before)
    assert read_live(locate(place)) == history[-1]


def test_programs_that_change_it_at_once_make_one_history(tmp_path):
    change_at_once(str(tmp_path), "xyz", 8)
    assert json.loads((tmp_path / "live.json").read_bytes())["number"] == 24


@pytest.mark.slow
def test_on_a_busy_object_store_too(s3_place, s3_door):
    with s3_door.orders(faults=0.05, seed=2) as door:
        change_at_once(s3_place("changed_at_once"), "xy", 4)
        assert door.told()["faults"] > 5
