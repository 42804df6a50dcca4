"""Who may work on a study: one program at a time, and whoever comes after one that died."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from rafce_ray.errors import UsageError
from rafce_ray.study.driver import DRIVER_FILE, SILENT_S, sole_driver
from rafce_ray.study_folder import StudyFolder


@pytest.fixture
def study(tmp_path) -> StudyFolder:
    return StudyFolder(str(tmp_path / "study"))


def held_by(study: StudyFolder, **holder) -> None:
    record = {"host": "elsewhere", "pid": 4711, "token": "other", "alive_at": time.time(), **holder}
    (study.location / DRIVER_FILE).write_bytes(json.dumps(record).encode())


def holder(study: StudyFolder) -> int:
    return json.loads((study.location / DRIVER_FILE).read_bytes())["pid"]


def test_a_second_program_is_refused_and_the_first_leaves_nothing_behind(study):
    with sole_driver(study):
        refusal = f"process {os.getpid()} on {socket.gethostname()} works on this study"
        with pytest.raises(UsageError, match=refusal), sole_driver(study):
            pytest.fail("two at once")
        assert (study.location / DRIVER_FILE).exists(), "the one that was refused must not free it"
    assert not (study.location / DRIVER_FILE).exists()


def test_a_program_that_was_killed_holds_nothing(study):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    held_by(study, host=socket.gethostname(), pid=process.pid)
    with sole_driver(study):
        assert holder(study) == os.getpid()


def test_a_program_on_another_machine_holds_the_study_until_it_falls_silent(study):
    held_by(study)
    with pytest.raises(UsageError, match="process 4711 on elsewhere"), sole_driver(study):
        pytest.fail("it is held")
    held_by(study, alive_at=time.time() - SILENT_S - 1)
    with sole_driver(study):
        assert holder(study) == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}"])
def test_a_record_cut_short_holds_nothing(study, content):
    (study.location / DRIVER_FILE).write_bytes(content)
    with sole_driver(study):
        assert holder(study) == os.getpid()
