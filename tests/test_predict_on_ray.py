"""Prediction on a cluster: what local prediction says, whatever was killed on the way, and from and to an object
store.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import boto3
import numpy as np
import psutil
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from processes import is_alive, kill_all, running

from rafce_ray.base.storage import locate
from rafce_ray.cli.predict import main
from rafce_ray.faces.files import list_images

pytestmark = pytest.mark.ray

NUM_FILES = 600


@pytest.fixture
def images(drawn_faces, tmp_path) -> Path:
    """600 names for the drawn faces in two folders, one of them not UTF-8, two files that cannot be read and a text."""
    place, drawn = tmp_path / "images", sorted((drawn_faces / "aligned").iterdir())
    for number in range(NUM_FILES - 2):
        link = place / ("b" if number % 2 else "a") / (f"{number:04d}.jpg" if number else os.fsdecode(b"0000\xe9.jpg"))
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(drawn[number % len(drawn)], link)
    (place / "b" / "empty.jpg").touch()
    (place / "a" / "text.png").write_text("hello")
    (place / "a" / "notes.txt").write_text("hello")
    return place


def rows_of(place: str | Path, **options) -> list[dict]:
    return ds.dataset(place, **options).to_table().to_pylist()


def assert_same_rows(found: list[dict], expected: list[dict]) -> None:
    """Same files and faces in the same order; every number to 1e-6, everything else to the letter."""
    assert [row["path"] for row in found] == [row["path"] for row in expected]
    for key in expected[0]:
        one, other = ([row[key] for row in rows] for rows in (found, expected))
        if any(isinstance(value, float) for value in other):
            numbers = [np.array([np.nan if value is None else value for value in values]) for values in (one, other)]
            np.testing.assert_allclose(*numbers, rtol=0, atol=1e-6, err_msg=key)
        else:
            assert one == other, key


def test_a_run_whose_driver_and_worker_were_killed_says_what_local_prediction_says(
    images, write_bundle, tmp_path, on_the_cluster, until, capsys
):
    bundle, out = write_bundle(tmp_path / "bundle"), tmp_path / "out"
    common = ["--bundle", str(bundle), str(images), "--faces", "aligned"]
    command = [*common, "--ray", "--out", str(out), "--shard-files", "5", "--workers", "2"]

    # Local prediction needs no ray.
    without_ray = (
        "import sys; sys.modules['ray'] = None; from rafce_ray.cli.predict import main; sys.exit(main(sys.argv[1:]))"
    )
    local = [sys.executable, "-c", without_ray, *common, "--out", str(tmp_path / "local.parquet")]
    subprocess.run(local, check=True, capture_output=True)

    seen: set[int] = set()

    def has_a_shard() -> bool:
        seen.update(one.pid for one in workers())
        return len(seen) == 2 and any(out.glob("predictions/part-*"))

    said = tmp_path / "said"
    with running([sys.executable, "-m", "rafce_ray.predict", *command], on_the_cluster, said) as driver:
        until(has_a_shard, said.read_text, driver)
        kill_all(driver)
    # Its workers, which are the cluster's, live on for a moment.
    until(lambda: not any(map(is_alive, seen)))
    finished = {path: path.stat().st_mtime_ns for path in out.glob("predictions/part-*")}
    assert 0 < len(finished) < 120, "it was to be killed in the middle"

    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(out / "predictions", len(finished), killed))
    killer.start()
    assert main(command) == 0
    killer.join()
    assert len(killed) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[1] == f"{NUM_FILES} image files in 120 shards of up to 5; {len(finished)} shards are there already"
    assert "598 faces predicted in 598 of 600 files, 2 that could not be read (see error_code); 120 Parquet" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert sorted(os.listdir(out)) == [".listing.parquet", "plan.json", "predictions", "summary.json"]
    assert all(not name.startswith(".") for name in os.listdir(out / "predictions"))

    expected, found = pq.read_table(tmp_path / "local.parquet").to_pylist(), rows_of(out / "predictions")
    assert len(found) == NUM_FILES
    assert_same_rows(found, expected)
    assert [row["error_code"] for row in found if row["error_code"]] == ["unsupported_format", "empty"]
    sure = Counter(row["emotion"] for row in found if row["error_code"] is None and not row["emotion_unsure"])
    assert counted_as_the_guide_says(out) == sure
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["skipped"], found[0]["path"]) == ({".txt": 1}, f"file://{images}/a/0000%E9.jpg")
    assert {key: summary[key] for key in ("shards", "files", "predicted", "faces", "broken")} == {
        "shards": 120,
        "files": 600,
        "predicted": 598,
        "faces": 598,
        "broken": 2,
    }


def counted_as_the_guide_says(out: Path) -> dict[str, int]:
    """What the lines of docs/predict.md make of the predictions."""
    guide = (Path(__file__).parents[1] / "docs" / "predict.md").read_text()
    *lines, last = (
        re.search(r"```python\n(.*?)\n```", guide, re.DOTALL)[1].replace("PREDICTIONS", str(out)).splitlines()
    )
    scope: dict = {}
    exec("\n".join(lines), scope)
    return eval(last, scope).to_dict()


def kill_a_worker(folder: Path, num_before: int, killed: list[int]) -> None:
    """End a worker's process once a further shard is there."""
    deadline = time.monotonic() + 240
    while not killed and time.monotonic() < deadline:
        time.sleep(0.01)
        if len(list(folder.glob("part-*"))) > num_before:
            for one in workers():
                with suppress(psutil.NoSuchProcess):
                    one.kill()
                    killed.append(one.pid)
                    break


def workers() -> list[psutil.Process]:
    """Processes of this cluster that predict; a worker has the name only while it works."""
    found = []
    # Processes come and go meanwhile.
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ShardPredictor" in " ".join(one.cmdline()):
                found.append(one)
    return found


def test_images_and_predictions_on_an_object_store(
    s3_endpoint, s3_place, drawn_faces, write_bundle, tmp_path, ray_cluster_of_tests, capsys
):
    bundle, drawn = write_bundle(tmp_path / "bundle"), sorted((drawn_faces / "aligned").iterdir())[:12]
    client = boto3.client("s3", endpoint_url=f"http://{s3_endpoint}")
    client.create_bucket(Bucket="pictures")
    for number, path in enumerate(drawn):
        client.upload_file(str(path), "pictures", f"in/{'deep/er/' if number % 2 else ''}{path.name}")
    client.put_object(Bucket="pictures", Key="in/notes.txt", Body=b"no image")

    source, out = s3_place("in", "pictures"), s3_place("out")
    deep, flat = (sorted(path.name for path in drawn[start::2]) for start in (1, 0))
    expected_names = [f"s3://pictures/in/{name}" for name in flat] + [
        f"s3://pictures/in/deep/er/{name}" for name in deep
    ]
    assert list(list_images([source])) == expected_names
    command = ["--bundle", str(bundle), "--faces", "aligned", "--ray", "--shard-files", "5", "--workers", "2"]
    assert main([*command, source, "--out", out]) == 0
    assert "12 faces predicted in 12 of 12 files" in capsys.readouterr().err.splitlines()[-1]
    place = locate(out) / "predictions"
    found = rows_of(place.path, filesystem=place.filesystem)
    assert [row["path"] for row in found] == expected_names

    assert (
        main(
            [str(path) for path in drawn]
            + ["--bundle", str(bundle), "--faces", "aligned", "--out", str(tmp_path / "l.parquet")]
        )
        == 0
    )
    local = {Path(row["path"]).name: row for row in pq.read_table(tmp_path / "l.parquet").to_pylist()}
    assert_same_rows(found, [local[Path(row["path"]).name] | {"path": row["path"]} for row in found])

    # The same command again finds all there; another listing is refused.
    assert main([*command, source, "--out", out]) == 0
    assert "3 shards are there already" in capsys.readouterr().err
    client.delete_object(Bucket="pictures", Key=f"in/{flat[0]}")
    assert main([*command, source, "--out", out]) == 2
    assert f"12 files there, 11 now; the first that differs is {expected_names[0]} there" in capsys.readouterr().err


def test_a_store_that_cannot_be_listed_is_said(s3_place, write_bundle, tmp_path, capsys):
    bundle = write_bundle(tmp_path / "bundle")
    for place, message in (
        (s3_place("none"), "no such file or folder"),
        (s3_place("x", "missing"), "no such file or folder"),
    ):
        command = [place, "--bundle", str(bundle), "--ray", "--out", str(tmp_path / "out")]
        assert main(command) == 2
        assert message in capsys.readouterr().err
