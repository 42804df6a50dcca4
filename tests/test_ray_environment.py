"""What is told of RAY_ADDRESS and RAY_TMPDIR before Ray starts: the variable, the reason and a remedy that works when
pasted.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.config import load_config
from rafce_ray.train import environment
from rafce_ray.train.environment import check_ray, dashboard_line, ray_folder

CHECK = "from rafce_ray.train.environment import check_ray; check_ray()"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path) -> None:
    """Neither variable is set, and this process has not joined the cluster of other tests."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "is_initialized", lambda: False)
    monkeypatch.setattr(environment, "ANSWER_S", 1.0)


@contextmanager
def closed() -> Iterator[int]:
    """A port on which nothing can listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextmanager
def silent() -> Iterator[int]:
    """A port on which a program listens that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def another_grpc() -> Iterator[int]:
    """A port on which a gRPC server listens that is no head of a cluster, as Ray Client's."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def refused() -> str:
    with pytest.raises(UsageError) as caught:
        check_ray()
    return str(caught.value)


def paste(remedy: str) -> None:
    """Give a remedy to a shell in which the variable is set as it is here, and look again."""
    done = subprocess.run(
        ["bash", "-c", f"{remedy}\nexec {sys.executable} -c '{CHECK}'"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("port", "why"),
    [
        (closed, "nothing answers there (Connection refused)"),
        (silent, "what listens there is not the head of a Ray cluster"),
        (another_grpc, "what listens there is not the head of a Ray cluster"),
    ],
)
def test_an_address_at_which_there_is_no_cluster(port, why, monkeypatch):
    with port() as number:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{number}")
        said = refused()
        assert f"RAY_ADDRESS=127.0.0.1:{number}: {why}" in said
        paste(re.search(r"unset RAY_ADDRESS$", said)[0])


@pytest.mark.parametrize("address", ["somewhere", "127.0.0.1", "127.0.0.1:99999", "127.0.0.1:port", "[::1", ":6379"])
def test_what_is_no_address(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"RAY_ADDRESS={address} is no address of a Ray cluster: expected HOST:PORT" in refused()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_addresses_of_other_doors_name_the_command_for_them(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    said = refused()
    assert f"RAY_ADDRESS={address} is a" in said
    assert "ray job submit" in said


def test_auto_after_a_cluster_that_is_gone(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    check_ray()
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    with closed() as port:
        file.write_text(f"127.0.0.1:{port}")
        said = refused()
        assert f"RAY_ADDRESS=auto: the last cluster that was started here is '127.0.0.1:{port}'" in said
        paste(re.search(r"rm \S+", said)[0])
    assert not file.exists()
    file.write_text("cut sh")
    assert "no HOST:PORT" in refused()


@pytest.mark.parametrize("address", ["", "local"])
@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_too_long_for_sockets(name, address, monkeypatch):
    """The limit itself: one byte less is taken."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv(name, "/tmp/" + "x" * 75)
    said = refused()
    assert f"{name}=/tmp/{'x' * 75} is 80 bytes long" in said
    most = int(re.search(r"at most (\d+) bytes", said)[1])
    paste(re.search(r"export RAY_TMPDIR=.*$", said)[0])
    monkeypatch.setenv(name, "/tmp/".ljust(most + 1, "x"))
    assert f"is {most + 1} bytes long" in refused()
    # Ray's own limit, of the path of its first socket.
    socket_of_ray = f"{'x' * most}/ray/session_2026-01-31_12-00-00_123456_{os.getpid()}/sockets/plasma_store"
    assert len(socket_of_ray) == environment.SOCKET_PATH_BYTES


def test_a_folder_in_which_nothing_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(environment, "SOCKET_PATH_BYTES", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    said = refused()
    assert said.startswith(f"RAY_TMPDIR={tmp_path / 'file'}: Ray cannot write its files there (Not a directory).")
    paste(re.search(r"export RAY_TMPDIR=.*$", said)[0])


@pytest.fixture
def commands(write_bundle, tmp_path) -> dict[str, Callable[[], int]]:
    """Every command that starts or joins Ray."""
    from rafce_ray.cli import ablate, predict, replay, serve, train, tune

    (tmp_path / "study.yaml").write_text("name: x\nnum_trials: 2\nspace:\n  optim.lr: {choice: [0.001, 0.01]}\n")
    data, bundle = f"data.root={tmp_path}", str(tmp_path / "bundle")
    write_bundle(tmp_path / "bundle", with_canary=False)
    return {
        "train": lambda: train.main([data]),
        "tune": lambda: tune.main(["--config", str(tmp_path / "study.yaml"), f"base.{data}"]),
        "ablate": lambda: ablate.main([data]),
        "replay": lambda: replay.main([str(tmp_path)]),
        "predict --ray": lambda: predict.main(
            ["--bundle", bundle, str(tmp_path), "--ray", "--out", str(tmp_path / "out")]
        ),
        "serve": lambda: serve.main(["--bundle", bundle, "--port", "8765"]),
    }


@pytest.mark.parametrize("name", ["train", "tune", "ablate", "replay", "predict --ray", "serve"])
def test_every_command_says_so_before_it_reads_or_writes_anything(name, commands, monkeypatch, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    with closed() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert commands[name]() == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: RAY_ADDRESS=127.0.0.1:{port}: nothing answers there" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_what_ray_itself_says_is_one_line_with_the_variable(monkeypatch, tmp_path):
    import ray

    from rafce_ray.train.launch import ray_cluster

    def init(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with (
        pytest.raises(RafceError, match="RAY_ADDRESS=auto: no Ray cluster runs on this machine"),
        ray_cluster(load_config(), "test"),
    ):
        pytest.fail("there is no cluster")


@pytest.mark.slow
def test_a_node_that_does_not_start_in_time_is_one_line_with_its_logs(monkeypatch, tmp_path):
    import ray

    from rafce_ray.train.launch import ray_cluster

    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because of an overload.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(environment, "SOCKET_PATH_BYTES", 1000)
    with (
        pytest.raises(RafceError, match=r"Ray could not be started: The current node timed out .* logs are in"),
        ray_cluster(load_config(), "test"),
    ):
        pytest.fail("Ray did not start")


def test_a_folder_of_rays_is_made_where_there_is_none(monkeypatch, tmp_path):
    folder = Path("/tmp") / f"r{os.getpid()}"
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    try:
        check_ray()
        assert list(folder.iterdir()) == [folder / "ray"]
    finally:
        (folder / "ray").rmdir()
        folder.rmdir()


@pytest.mark.parametrize(
    ("environment", "folder"),
    [({}, "/tmp/ray"), ({"TMPDIR": "/scratch"}, "/scratch/ray"), ({"TMPDIR": "/a", "RAY_TMPDIR": "/b"}, "/b/ray")],
)
def test_rays_folder_is_found_where_ray_puts_it(monkeypatch, environment, folder):
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ray_folder() == Path(folder)


def test_the_dashboards_line_says_how_to_get_past_what_guards_it():
    plain = dashboard_line("127.0.0.1:8265", "jobs", {"RAY_AUTH_MODE": "disabled"}, started_here=True)
    assert plain == "dashboard: http://127.0.0.1:8265/#/jobs; curves: rafce monitor --write monitor"
    guarded = dashboard_line("127.0.0.1:8265", "jobs", {"RAY_AUTH_MODE": "token"}, started_here=False)
    assert "#/jobs (it asks for a token: ray get-auth-token prints it; " in guarded
    assert "ssh -N -L 8265:127.0.0.1:8265 HEAD-NODE" in guarded
    assert "ssh" not in dashboard_line("10.0.0.7:8265", "jobs", {}, started_here=False)


def test_another_release_of_ray_is_reported_with_the_tested_one(monkeypatch, capsys):
    monkeypatch.setattr(environment, "version", lambda package: "2.99.0")
    check_ray()
    told = capsys.readouterr().err
    assert "Ray 2.99.0 is installed; rafce_ray is tested with Ray 2.60.0 only" in " ".join(told.split())
    with (
        pytest.raises(RafceError, match=r"Ray 2\.99\.0 has moved a private part of Ray Tune .*pip install"),
        environment.private_part("Ray Tune"),
    ):
        from ray.tune import no_such_part  # noqa: F401


def test_a_missing_ray_is_reported_with_the_command_that_installs_it(monkeypatch):
    def missing(package: str) -> str:
        raise environment.PackageNotFoundError(package)

    monkeypatch.setattr(environment, "version", missing)
    with (
        pytest.raises(UsageError, match=r"Ray is not installed\. .*pip install"),
        environment.private_part("Ray Tune"),
    ):
        from ray.tune import no_such_part  # noqa: F401
