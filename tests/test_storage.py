from pathlib import Path

import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import locate


def test_a_local_path_becomes_absolute_and_a_file_uri_is_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("runs").local == tmp_path / "runs"
    assert locate(f"file://{tmp_path}/runs").local == tmp_path / "runs"


def test_a_name_with_a_tilde_of_nobody_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("~nobody here/x").local == tmp_path / "~nobody here" / "x"
    assert locate("~/x").local == Path.home() / "x"


def test_joining_keeps_a_uris_query():
    place = locate("s3://bucket/base?region=eu-west-1&endpoint_override=localhost:9") / "part"
    assert place.uri == "s3://bucket/base/part?region=eu-west-1&endpoint_override=localhost:9"
    assert (place.path, place.local, place.name) == ("bucket/base/part", None, "part")


def test_writing_replaces_the_whole_file_and_leaves_nothing_beside(tmp_path):
    place = locate(tmp_path / "deep" / "file.txt")
    place.write_bytes(b"old")
    place.write_bytes(b"new")
    assert place.read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.txt"]


def test_folders_travel_whole(tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "a").write_text("1")
    there = locate(tmp_path / "there")
    there.upload(source)
    there.download(tmp_path / "back")
    assert (tmp_path / "back" / "inner" / "a").read_text() == "1"
    assert [info.base_name for info in there.list(recursive=True)] == ["inner", "a"]
    there.delete()
    assert not there.exists()
    assert there.list() == []


def test_an_unknown_scheme_is_a_usage_error():
    with pytest.raises(UsageError, match="ftp"):
        locate("ftp://host/x")


def test_a_submitted_jobs_own_folder_is_refused_as_storage(tmp_path, monkeypatch):
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(UsageError, match="removes after it: nothing would be left"):
        locate("runs").check_writable()
    locate(tmp_path / "runs").check_writable()
