"""Object stores: what is tried again and what is not, what errors say, and that nothing half-written is taken for
whole.
"""

import errno
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from serving import free_port

from rafce_ray.base import storage
from rafce_ray.base.console import to_json
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import PAUSES_S, StorageError, ask, locate
from rafce_ray.cli import main as rafce
from rafce_ray.config import DataConfig, load_config
from rafce_ray.data.loader import prepare
from rafce_ray.registry.versions import add_version, version_names
from rafce_ray.run.checkpoint import Checkpoint, list_checkpoints, newest_valid
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.loop import fit
from rafce_ray.run.state import Job, LocalSession
from rafce_ray.service.live import Source

BUSY = OSError(
    "When uploading object 'k': AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."
)
SILENT = OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7, Couldn't connect to server")
DENIED = OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied")
PARTLY_DELETED = OSError(
    "Got the following 1 errors when deleting objects in S3 bucket 'b':\n- key 'k': Please reduce your request rate."
)


@pytest.fixture
def no_pauses(monkeypatch) -> list[float]:
    """The pauses that would have been made."""
    made: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", made.append)
    return made


@pytest.fixture(autouse=True)
def met_for_the_first_time():
    """No store has answered yet, and no connection of another test, with its credentials, is used."""
    storage._has_answered.clear()
    storage._filesystem.cache_clear()
    yield
    storage._filesystem.cache_clear()


def answering(*answers: OSError | str) -> tuple[Callable[[], str], list[None]]:
    """A request that gives these answers in turn, and a list that grows with each."""
    given, asked = iter(answers), []

    def request() -> str:
        asked.append(None)
        answer = next(given)
        if isinstance(answer, OSError):
            raise answer
        return answer

    return request, asked


@pytest.mark.parametrize("busy", [BUSY, PARTLY_DELETED], ids=["busy", "partly deleted"])
def test_a_busy_store_is_asked_again_with_longer_pauses_and_that_is_said(busy, no_pauses, caplog):
    request, asked = answering(busy, busy, "done")
    with caplog.at_level(logging.WARNING):
        assert ask("s3://b/k", request) == "done"
    assert (len(asked), no_pauses) == (3, [1.0, 2.0])
    assert [
        record.getMessage() for record in caplog.records if "Please reduce your request rate" in record.getMessage()
    ]
    assert "s3://b/k: " in caplog.text
    assert "Trying again in 2 s." in caplog.text


def test_a_store_that_stays_busy_is_given_up(no_pauses):
    request, asked = answering(*[BUSY] * 20)
    with pytest.raises(StorageError, match=r"s3://b/k: .*SLOW_DOWN.* try again later") as raised:
        ask("s3://b/k", request)
    assert (len(asked), no_pauses) == (len(PAUSES_S) + 1, list(PAUSES_S))
    assert raised.value.may_pass


@pytest.mark.parametrize(
    "refusal",
    [
        DENIED,
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist"),
        OSError("AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."),
        FileNotFoundError(2, "Path does not exist 'b/k'"),
    ],
    ids=["denied", "no bucket", "bad request", "no file"],
)
def test_a_refusal_is_not_asked_again(refusal, no_pauses):
    request, asked = answering(refusal, "done")
    with pytest.raises((StorageError, FileNotFoundError)) as raised:
        ask("s3://b/k", request)
    assert (len(asked), no_pauses) == (1, [])
    assert isinstance(raised.value, FileNotFoundError) or not raised.value.may_pass


def test_silence_is_an_outage_only_of_a_store_that_answered_before(no_pauses):
    request, asked = answering(SILENT, "done")
    with pytest.raises(StorageError, match=r"no answer: .*curlCode: 7.*endpoint_override=HOST:PORT"):
        ask("s3://b/k", request)
    assert len(asked) == 1
    assert ask("s3://b/other", lambda: "there") == "there"
    request, asked = answering(SILENT, "done")
    assert ask("s3://b/k", request) == "done"
    assert (len(asked), no_pauses) == (2, [1.0])


def test_an_impatient_request_is_asked_once(no_pauses):
    request, asked = answering(BUSY, "done")
    with pytest.raises(StorageError):
        ask("s3://b/k", request, patient=False)
    assert (len(asked), no_pauses) == (1, [])


def test_a_full_disk_is_not_the_stores_fault(no_pauses):
    request, asked = answering(OSError(errno.ENOSPC, "Error writing bytes to file '/tmp/x'. No space left on device"))
    with pytest.raises(StorageError, match=r"No space left on device.* Make room on this machine's disk"):
        ask("s3://b/k", request)
    assert len(asked) == 1


def test_a_storage_error_travels_between_processes_as_it_is():
    error = StorageError("s3://b/k: why", "why", may_pass=True)
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.why, found.may_pass, found.exit_code) == ("s3://b/k: why", "why", True, 1)
    assert isinstance(found, OSError)
    assert isinstance(found, RafceError)


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(UsageError, match=r"s3://…@bucket holds credentials.*AWS_ACCESS_KEY_ID") as raised:
        locate("s3://AKIAKEY:secret@bucket/runs")
    assert "secret" not in str(raised.value)
    assert "AKIAKEY" not in str(raised.value)


@pytest.mark.parametrize(
    "command",
    [
        ["export", "--bundle", "b", "--format", "onnx", "--out", "s3://bucket/exported"],
        ["data", "synthesize", "--out", "s3://bucket/faces"],
    ],
)
def test_what_is_written_to_a_disk_alone_says_so(command, capsys):
    with pytest.raises(SystemExit) as ended:
        rafce(command)
    assert ended.value.code == 2
    assert f"{command[-1]} is a URI" in capsys.readouterr().err


# What follows asks a server.


@pytest.fixture
def nowhere() -> str:
    """A URI of a server that does not answer."""
    return f"s3://faces/runs?endpoint_override=127.0.0.1:{free_port()}&scheme=http"


@pytest.fixture
def checked(s3_endpoint):
    """The server checks who asks; the key of somebody who may only read."""
    identities = boto3.client("iam", endpoint_url=f"http://{s3_endpoint}")
    name = f"reader{time.monotonic_ns()}"
    identities.create_user(UserName=name)
    read = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [read]})
    identities.put_user_policy(UserName=name, PolicyName="read", PolicyDocument=policy)
    key = identities.create_access_key(UserName=name)["AccessKey"]

    def check_after(requests: str) -> None:
        url = f"http://{s3_endpoint}/moto-api/reset-auth"
        headers = {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), headers, method="POST")).close()

    check_after("0")
    yield key
    check_after("inf")


@pytest.mark.slow
@pytest.mark.parametrize("who", ["nobody", "an impostor", "a reader"])
def test_credentials_that_are_wrong_or_may_only_read_are_said(who, checked, s3_door, s3_place, monkeypatch):
    key, secret, told = {
        "nobody": ("AKIANOBODY", "secret", "INVALID_ACCESS_KEY_ID.*Used was AWS_ACCESS_KEY_ID=AKIA…"),
        "an impostor": (checked["AccessKeyId"], "secret", "SIGNATURE_DOES_NOT_MATCH"),
        "a reader": (checked["AccessKeyId"], checked["SecretAccessKey"], "ACCESS_DENIED"),
    }[who]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    place = locate(s3_place("runs"))
    with s3_door.orders() as door:
        with pytest.raises(
            UsageError, match=f"cannot be used as storage: .*may not do this.*{told}.*Set AWS_ACCESS"
        ) as error:
            place.check_writable()
        assert door.count() == 1, "a refusal is not asked again"
    assert place.uri in str(error.value)
    assert secret not in str(error.value)


@pytest.mark.slow
def test_no_credentials_at_all_are_said(s3_door, s3_place, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    place = locate(s3_place("runs"))
    with (
        s3_door.orders(signed=True),
        pytest.raises(StorageError, match=r"There are none: AWS_ACCESS_KEY_ID is not set") as error,
    ):
        place.list()
    assert place.uri in str(error.value)


@pytest.mark.slow
def test_a_storage_that_may_only_be_read_is_said_before_anything_is_done(s3_door, s3_place):
    place = locate(s3_place("runs"))
    with s3_door.orders(deny=["PUT", "POST", "DELETE"]) as door:
        with pytest.raises(
            UsageError, match=r"cannot be used as storage: .*ACCESS_DENIED during PutObject.*may read, write and"
        ):
            place.check_writable()
        assert door.told()["requests"] == {"PutObject": 1}


@pytest.mark.slow
def test_a_missing_bucket_is_said(s3_place):
    place = locate(s3_place("runs", "missing"))
    for check, told in ((place.check_writable, "used as storage"), (place.check_reachable, "reached")):
        with pytest.raises(UsageError) as error:
            check()
        assert (
            str(error.value) == f"{place} cannot be {told}: there is no bucket 'missing'. Make it, or correct the URI."
        )
    locate(s3_place("nothing_yet")).check_reachable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "told"),
    [
        (["evaluate", "--bundle"], "missing", "there is no bucket 'missing'"),
        (["predict", __file__, "--bundle"], "missing", "there is no bucket 'missing'"),
        (["report"], "missing", "there is no bucket 'missing'"),
        (["doctor"], "missing", "there is no bucket 'missing'"),
        (["data", "audit"], "missing", "there is no bucket 'missing'"),
        (["bundle", "list"], "missing", "there is no bucket 'missing'"),
        (["bundle", "list"], "denied", "credentials may not do this"),
        (["serve", "--registry"], "denied", "credentials may not do this"),
        (["doctor"], "nowhere", "no answer"),
    ],
)
def test_commands_say_it_in_a_line(command, place, told, s3_place, s3_door, nowhere, caplog, capsys):
    uri = {"missing": s3_place("it", "missing"), "denied": s3_place("it"), "nowhere": nowhere}[place]
    with s3_door.orders(deny=["GET", "HEAD"] if place == "denied" else []):
        code = rafce([*command, uri])
    said = capsys.readouterr().err
    assert code in (1, 2)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert uri.partition("?")[0] in line
    assert told in line
    assert "Traceback" not in said
    assert "Trying again" not in caplog.text


@pytest.mark.slow
def test_an_endpoint_of_the_environment_is_asked(s3_endpoint, s3_place, monkeypatch):
    locate(s3_place("by_variable")).write_bytes(b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_endpoint}")
    assert locate("s3://faces/by_variable").read_bytes() == b"1"


@pytest.mark.slow
def test_an_outage_that_lasts_longer_than_pyarrow_waits_is_waited_for(s3_door, s3_place, caplog):
    place = locate(s3_place("outage/file"))
    with s3_door.orders(faults=1.0) as door, caplog.at_level(logging.WARNING):
        end = threading.Timer(8, door.set)
        end.start()
        place.write_bytes(b"whole")
        end.join()
    assert place.read_bytes() == b"whole"
    assert f"{place}: " in caplog.text
    assert "Trying again in 1 s." in caplog.text


@pytest.mark.slow
def test_files_travel_whole_where_one_request_in_four_is_answered_503(s3_door, s3_place, tmp_path):
    place = locate(s3_place("busy"))
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    contents = {f"{number}": os.urandom(1000) for number in range(20)} | {"inner/large": os.urandom(21 * 2**20)}
    for name, content in contents.items():
        (tmp_path / "folder" / name).write_bytes(content)
    with s3_door.orders(faults=0.25, seed=3) as door:
        place.upload(tmp_path / "folder")
        place.download(tmp_path / "back")
        for name in ("0", "1"):
            (place / name).delete()
        left = [info.path for info in place.list(recursive=True) if info.is_file]
        faults = door.told()["faults"]
    assert faults > 20
    assert {name: (tmp_path / "back" / name).read_bytes() for name in contents} == contents
    assert len(left) == len(contents) - 2


def test_a_decoded_store_gets_last_the_file_that_makes_it_whole(s3_door, s3_place, drawn_faces, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with s3_door.orders() as door:
        prepare(DataConfig(root=str(drawn_faces), store_dir=s3_place("whole")))
        written = [
            line for line in door.told()["log"] if re.match("(PutObject|CompleteMultipartUpload) faces/whole/", line)
        ]
    names = [line.rpartition("/")[2] for line in written]
    assert (len(names), names[-1]) == (4, "store.json")


@pytest.mark.slow
def test_a_busy_store_is_taken_for_storage(s3_door, s3_place):
    """pyarrow repeats most requests that are answered 503 by itself, but no reading of an object."""
    place = locate(s3_place("busy-start"))
    with s3_door.orders(faults=0.25, seed=3) as door:
        for _ in range(8):
            place.check_writable()
        requests, faults = door.told()["requests"], door.told()["faults"]
    assert faults > 5
    assert requests["GetObject"] > 8, "none of the answers 503 met a reading"


SAVES_TWO = """
import sys, torch
from rafce_ray.run.checkpoint import save_checkpoint
from rafce_ray.base.storage import locate
def save_bundle(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(21 * 2**20))
    (folder / "bundle.json").write_text("{}")
for epoch in (1, 2):
    save_checkpoint(locate(sys.argv[1]), epoch=epoch, step=0, score=epoch / 10, state={"epoch": torch.tensor(epoch)},
                    save_bundle=save_bundle)
"""


def killed_where(program: str, *arguments: str, hold: str, door) -> None:
    """Run a program whose first request that fits ``hold`` is not answered, and kill it there."""
    with door.orders(hold=hold):
        process = subprocess.Popen([sys.executable, "-c", program, *arguments])
        deadline = time.monotonic() + 120
        while not door.told()["held"]:
            assert process.poll() is None, "it ended before it came there"
            assert time.monotonic() < deadline, "it did not come there"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hold", "left"),
    [
        ("^CompleteMultipartUpload .*epoch_0002.*model", set()),
        ("^PutObject .*epoch_0002.*/manifest", {"bundle/model.safetensors", "bundle/bundle.json", "trainer_state.pt"}),
    ],
    ids=["within a file of several parts", "before the manifest"],
)
def test_a_checkpoint_whose_writer_was_killed_never_counts(hold, left, s3_endpoint, s3_door, s3_place):
    place = s3_place(f"torn/{len(left)}/checkpoints")
    killed_where(SAVES_TWO, place, hold=hold, door=s3_door)
    folder = locate(place)
    checkpoint, invalid = newest_valid(folder)
    assert checkpoint is not None
    assert checkpoint.epoch == 1
    torn = folder / "epoch_0002_step_00000"
    found = {info.path.removeprefix(f"{torn.path}/") for info in torn.list(recursive=True) if info.is_file}
    assert found == left, "no half object counts as a file"
    assert [one.name for one in invalid] == ([torn.name] if left else [])
    # What is left of the parts costs money and is not listed among files: docs/storage.md says how to be rid of it.
    client = boto3.client("s3", endpoint_url=f"http://{s3_endpoint}")
    uploads = client.list_multipart_uploads(Bucket="faces").get("Uploads", [])
    assert sum(torn.path.endswith(one["Key"].split("/bundle")[0]) for one in uploads) == (0 if left else 1)
    done = subprocess.run([sys.executable, "-c", SAVES_TWO, place], check=False)
    assert done.returncode == 0
    assert newest_valid(folder) == (Checkpoint(torn, 2, 0, 0.2), [])


@pytest.mark.slow
def test_a_store_that_fails_while_checkpoints_are_read_loses_none(s3_door, s3_place, no_pauses):
    """Taken for damaged, they would be trained again without a word."""
    place = locate(s3_place("unread/checkpoints"))
    (place / "epoch_0001_step_00000" / "manifest.json").write_bytes(
        b'{"epoch": 1, "step": 0, "score": 0.1, "sha256": {}}'
    )
    with s3_door.orders(deny=["HEAD"]), pytest.raises(StorageError, match="ACCESS_DENIED"):
        list_checkpoints(place)
    assert [one.epoch for one in list_checkpoints(place)[0]] == [1]


ADDS = """
import sys
from rafce_ray.registry.versions import add_version
from rafce_ray.base.storage import locate
add_version(locate(sys.argv[1]), sys.argv[2], "one")
"""


@pytest.mark.slow
def test_a_version_whose_upload_was_killed_is_none_and_can_be_added_again(write_bundle, s3_door, s3_place, tmp_path):
    place, bundle = s3_place("torn_registry"), write_bundle(tmp_path / "bundle")
    killed_where(ADDS, place, str(bundle), hold=r"^PutObject .*/versions/one/bundle\.json", door=s3_door)
    registry = locate(place)
    assert len((registry / "versions" / "one").list()) > 1
    assert version_names(registry) == []
    assert add_version(registry, str(bundle), "one") == ("one", True)
    assert version_names(registry) == ["one"]


@pytest.mark.slow
def test_a_look_at_what_is_live_costs_two_requests(write_bundle, s3_door, s3_place, tmp_path):
    place = s3_place("looked_at")
    bundle = write_bundle(tmp_path / "bundle")
    promote = ["bundle", "promote", place, str(bundle), "--engine", "torch", "--as", "one"]
    assert rafce(promote) == 0
    source = Source(None, place)
    assert source.look().version == "one"
    with s3_door.orders() as door:
        source.look()
        assert door.told()["requests"] == {"HeadObject": 1, "GetObject": 1}


@pytest.fixture(scope="module")
def run_on_s3(trained_run, drawn_faces, s3_place) -> tuple[str, str]:
    """URIs of a finished run and of its data."""
    run, faces = locate(s3_place("commands/tiny")), locate(s3_place("commands/faces"))
    run.upload(trained_run[0])
    faces.upload(drawn_faces)
    return run.uri, faces.uri


@pytest.fixture
def home(monkeypatch, tmp_path_factory) -> Path:
    """Where copies of stores on S3 are kept."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def answer_of(command: list[str], capsys) -> dict:
    """What a command with ``--json`` prints last."""
    capsys.readouterr()
    assert rafce(command) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_figures_of_a_bundle_and_data_on_s3_are_those_of_the_disk(
    run_on_s3, trained_run, drawn_faces, store_dir, s3_place, home, capsys
):
    run, faces = run_on_s3
    told = ["--split", "validation", "--device", "cpu", "--json"]
    there = ["evaluate", "--bundle", run, *told, f"data.root={faces}", f"data.store_dir={s3_place('commands/stores')}"]
    here = [
        "evaluate",
        "--bundle",
        str(trained_run[0]),
        *told,
        f"data.root={drawn_faces}",
        f"data.store_dir={store_dir}",
    ]
    places = ("bundle", "data_root")
    found, expected = ({k: v for k, v in answer_of(one, capsys).items() if k not in places} for one in (there, here))
    assert to_json(found) == to_json(expected)
    (copy,) = [path for path in (home / ".cache" / "rafce_ray" / "stores").iterdir() if path.is_dir()]
    assert (locate(s3_place("commands/stores")) / copy.name / "store.json").exists()


@pytest.mark.slow
def test_every_command_that_reads_a_run_reads_it_on_s3(run_on_s3, s3_place, home, tmp_path, drawn_faces, capsys):
    run, faces = run_on_s3
    audit = s3_place("commands/audit.json")
    assert rafce(["data", "audit", faces, "--labels-only", "--json", audit]) == 0
    assert json.loads(locate(audit).read_bytes())["splits"]
    assert "diagnoses" in answer_of(["doctor", run, "--json"], capsys)
    page = answer_of(["report", run, "--no-images", "--json"], capsys)["report"]
    assert page == str(RunFolder(run).location / "report.html")
    assert b"</html>" in locate(page).read_bytes()
    other = locate(s3_place("commands/other"))
    locate(run).download(tmp_path / "copy")
    other.upload(tmp_path / "copy")
    assert answer_of(["compare", run, str(other), "--json"], capsys)["runs"]
    photo = str(next((drawn_faces / "aligned").iterdir()))
    answer = answer_of(["predict", photo, "--bundle", run, "--faces", "aligned", "--device", "cpu"], capsys)
    assert len(answer["faces"]) == 1
    assert rafce(["export", "--bundle", run, "--format", "torch-export", "--out", str(tmp_path / "exported")]) == 0
    registry = s3_place("commands/registry")
    assert rafce(["bundle", "add", registry, run, "--as", "tiny"]) == 0
    assert answer_of(["bundle", "list", registry, "--json"], capsys)["version"] == "tiny"


@pytest.mark.slow
def test_an_epoch_costs_a_few_dozen_requests_whatever_the_number_of_images(tiny_overrides, s3_place, s3_door):
    """docs/storage.md tells these figures."""
    there = ["optim.epochs=5", "run.keep_checkpoints=1", f"run.storage={s3_place('counted')}"]
    config = load_config(overrides=[*tiny_overrides, *there])
    prepared = prepare(config.data)
    folder = RunFolder(s3_place("counted/run"))
    folder.start(config, {}, prepared.audit.to_json())
    asked: list[dict[str, int]] = []

    class Counting(LocalSession):
        def report(self, record: dict) -> None:
            asked.append(s3_door.told()["requests"])

    with s3_door.orders():
        fit(Job(config, prepared.store_uri, prepared.taxonomy, folder.place, {}), Counting())
    # The first epoch's have those of the start.
    per_epoch = {name: (count - asked[0].get(name, 0)) / 4 for name, count in asked[-1].items()}
    assert per_epoch["PutObject"] <= 8, per_epoch
    assert sum(per_epoch.values()) <= 30, per_epoch
    # Five were written and at most three stay: removing them is among these requests.
    assert len(list_checkpoints(folder.checkpoints)[0]) <= 3
