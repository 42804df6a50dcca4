"""What the programs that measure the endpoint share: a bundle and faces to send, servers as processes, their CPU time
by part.
"""

from __future__ import annotations

import gc
import io
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from PIL import Image

from rafce_drawing.labelled import synthesize
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.taxonomy import RAFCE_EMOTIONS, SEED18, make_taxonomy
from rafce_ray.bundle.bundle import load_bundle, save_bundle
from rafce_ray.bundle.engines import build_engine
from rafce_ray.bundle.model import Predictor
from rafce_ray.faces.preprocess import Preprocessing
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.model.network import Architecture, build_model

STORED_PX = 112
CLIENTS = 32
BATCH = 32
START_S = 180


def keep_the_client_going() -> None:
    """Keep Python from looking for garbage among all that was imported: it would stop the client, and the server would
    seem slow.
    """
    gc.collect()
    gc.freeze()


def write_model(folder: Path, seed: int = 0, image_px: int = 112) -> Path:
    """A resnet18 for faces stored at 112 px, with 14 emotions and 18 action units, of random weights."""
    torch.manual_seed(seed)
    taxonomy = make_taxonomy(tuple(RAFCE_EMOTIONS), SEED18)
    sizes = (taxonomy.num_emotions, taxonomy.num_action_units)
    architecture = Architecture("resnet18", image_px, *sizes, components=(None,) * sizes[0])
    save_bundle(
        folder,
        model=build_model(architecture),
        architecture=architecture,
        taxonomy=taxonomy,
        preprocessing=Preprocessing(STORED_PX, image_px),
        calibration=Calibration(1.0, (0.5,) * taxonomy.num_action_units),
        association=None,
        metrics={},
        provenance={},
        model_card="# Model card: random weights, for measuring",
    )
    return folder


def write_faces(folder: Path, number: int = 32) -> list[bytes]:
    """Drawn faces as JPEG files of 112 px and about 4 KB; their bytes."""
    synthesize(folder / "drawn", number)
    (folder / "faces").mkdir()
    found = []
    for path in sorted((folder / "drawn" / "aligned").iterdir())[:number]:
        stream = io.BytesIO()
        Image.open(path).convert("RGB").resize((STORED_PX, STORED_PX)).save(stream, "JPEG", quality=93)
        found.append(stream.getvalue())
        (folder / "faces" / path.name).write_bytes(found[-1])
    return found


def predictor_of(bundle: str, engine: str) -> Predictor:
    """The bundle with the engine that ``rafce serve`` would give it."""
    found = load_bundle(bundle)
    threads = len(os.sched_getaffinity(0))
    return Predictor(found, engine=build_engine(found, engine, choose_device("auto"), threads, "auto")[0])


@dataclass
class Server:
    """A server in a session of its own: all of its processes are found, and ended, by it."""

    process: subprocess.Popen[str]
    port: int

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that its processes have used so far, by part."""
        found: dict[str, float] = defaultdict(float)
        for process, part in self.parts():
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[part] += times.user + times.system
        return dict(found)

    def parts(self) -> list[tuple[psutil.Process, str]]:
        """Its processes, with what each does."""
        found = []
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                found.append((process, next((part for mark, part in PARTS if mark in command), "other")))
        return found

    def pids(self, part: str) -> list[int]:
        """Processes of one part."""
        return [process.pid for process, other in self.parts() if other == part]

    def pause(self) -> None:
        """Let none of its processes run until :meth:`resume`: idle servers take a tenth of a core each.

        But for HAProxy, which takes nothing while it is idle: suspended with all else, it was gone at times when they
        went on.
        """
        for process, part in self.parts():
            if part != "proxy":
                with suppress(psutil.Error):
                    process.suspend()

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        for process, _ in reversed(self.parts()):
            with suppress(psutil.Error):
                process.resume()

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.resume()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


PARTS = (
    ("bin/haproxy", "proxy"),
    ("ray::ServeReplica", "replica"),
    ("ray::ServeController", "controller"),
    ("ray::ProxyActor", "Ray's proxy actor"),
    ("ray::HAProxyManager", "Ray's proxy actor"),
    ("gcs_server", "Ray"),
    ("raylet", "Ray"),
    ("ray/", "Ray"),
    ("ray::", "Ray"),
)
"""Marks in a command line, the first that fits, and what such a process is."""


def start_service(*arguments: str, environment: dict[str, str] | None = None, port: int | None = None) -> Server:
    """``rafce serve`` with these arguments, without Ray's dashboard; returns when it is ready.

    By default on a free port.
    """
    port = port or free_port()
    argv = [sys.executable, "-m", "rafce_ray.serve", "--port", str(port), "--no-dashboard", *arguments]
    server = Server(_started(argv, environment, stdout=subprocess.PIPE), port)
    if not select.select([server.process.stdout], [], [], START_S)[0] or not server.process.stdout.readline():
        server.stop()
        raise SystemExit(f"{' '.join(argv)} did not start")
    return server


def start_side(side: str, *arguments: str) -> Server:
    """A side of ``serving_sides.py`` that listens on a port, the last argument; returns when it answers."""
    port = free_port()
    server = Server(
        _started([*side_command(side), *arguments, str(port)], {"OMP_NUM_THREADS": str(os.cpu_count())}), port
    )
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/docs", timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return server
    server.stop()
    raise SystemExit(f"the side {side} did not start")


def side_command(side: str) -> list[str]:
    """The program of a side of ``serving_sides.py``."""
    return [sys.executable, str(Path(__file__).with_name("serving_sides.py")), side]


def _started(argv: list[str], environment: dict[str, str] | None, **options: object) -> subprocess.Popen[str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "OMP_NUM_THREADS")}
    return subprocess.Popen(
        argv,
        env=variables | (environment or {}),
        text=True,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        **options,
    )


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now.

    It lies below the ports that the system and Ray give out by themselves, so that nobody else gets it before it is
    used.
    """
    while True:
        with socket.socket() as one, suppress(OSError):
            port = random.SystemRandom().randrange(21_000, 30_000)
            one.bind(("127.0.0.1", port))
            return port
