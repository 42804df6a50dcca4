"""The London photographs from a server: every file checked, retried and resumed, then aligned and ready to train."""

import csv
import hashlib
import io
import shlex
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from matplotlib import cbook
from needs import PHOTOGRAPHS
from PIL import Image, ImageEnhance

from rafce_ray.cli import main
from rafce_ray.data import london
from rafce_ray.data.align import AlignSettings
from rafce_ray.report.data import read_slices

PEOPLE = {"001": "train", "002": "validation", "003": "test"}


class Server(SimpleHTTPRequestHandler):
    """Serves a folder. ``faults``: how often a path is answered otherwise before it is served, and how."""

    faults: dict[str, list[str]]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        fault = self.faults.get(self.path, [])
        how = fault.pop(0) if fault else ""
        if how.isdecimal():
            self.send_error(int(how))
        elif how == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"a part")
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def serve() -> Iterator[object]:
    """A function that serves a folder; it returns the address, and the class of the handler."""
    servers = []

    def start(folder: Path) -> tuple[str, type[Server]]:
        handler = type("Handler", (Server,), {"faults": {}, "asked": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    """A folder with the repository's paths for three people, and a manifest of its files."""
    root = tmp_path / "mirror"
    with Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        portrait = picture.convert("RGB").crop((100, 0, 430, 330)).resize((220, 220), Image.Resampling.BOX)
    rows = []
    for number, (person, split) in enumerate(PEOPLE.items()):
        sums = []
        for emotion in ("neutral", "smiling"):
            file = root / london.COPIES[0].paths[emotion].format(person)
            file.parent.mkdir(parents=True, exist_ok=True)
            factor = 1 - 0.05 * (2 * number + (emotion == "smiling"))
            ImageEnhance.Brightness(portrait).enhance(factor).save(file, quality=90)
            sums.append(hashlib.sha256(file.read_bytes()).hexdigest())
        rows.append([person, split, str(20 + number), "female", "white", *sums, *["0" * 64] * 2])
    manifest = tmp_path / "london.csv"
    header = london.MANIFEST.read_text().splitlines()[0]
    manifest.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    monkeypatch.setattr(london, "MANIFEST", manifest)
    monkeypatch.setattr(london, "PAUSES_S", (0.01, 0.01))
    return root


def test_the_manifest_has_each_photograph_once_and_no_person_in_two_splits():
    with london.MANIFEST.open() as stream:
        people = list(csv.DictReader(stream))
    assert len({one["person"] for one in people}) == len(people) == 102
    assert Counter(one["split"] for one in people) == {"train": 64, "validation": 19, "test": 19}
    for copy, number in zip(london.COPIES, (204, 172), strict=True):
        found = london.photographs(copy)
        assert len(found) == len({one.sha256 for one in found}) == len({one.path for one in found}) == number
        assert all(len(bytes.fromhex(one.sha256)) == 32 for one in found)


@pytest.mark.needs("photographs")
def test_the_manifest_agrees_with_the_photographs():
    with (PHOTOGRAPHS / "london_photos" / "labels.csv").open() as stream:
        labels = {one["name"]: (one["split"], one["emotion"], one["person"]) for one in csv.DictReader(stream)}
    found = london.photographs(london.COPIES[1])
    assert {one.name: (one.person["split"], one.emotion, one.person["person"]) for one in found} == labels
    for one in found[::20]:
        assert hashlib.sha256((PHOTOGRAPHS / one.path).read_bytes()).hexdigest() == one.sha256


def test_photographs_are_fetched_aligned_and_labelled(mirror, serve, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url, handler = serve(mirror)
    handler.faults |= {"/inst/smiling_front/002_08.jpg": ["503", "cut"], "/inst/neutral_front/003_03.jpg": ["429"]}
    command = ["data", "fetch", "london", "--url", url, "--px", "64"]
    assert main(command) == 0
    out = Path("faces/london")
    assert (out / "labels.csv").read_text() == "name,split,emotion,AU12,person\n" + "".join(
        f"{person}_{emotion}.jpg,{split},{emotion},{au},{person}\n"
        for person, split in PEOPLE.items()
        for emotion, au in (("neutral", 0), ("smiling", 1))
    )
    assert read_slices(str(out / "slices.csv")).columns["age"]["003_smiling.jpg"] == "22"
    attribution = (out / "ATTRIBUTION.md").read_text()
    assert all(word in attribution for word in ("Lisa DeBruine", "Benedict Jones", "5047666", "CC BY 4.0"))
    said = capsys.readouterr().err
    assert "Aligned 6 of 6 photographs" in said
    assert "Next: rafce train --recipe few data.root=faces/london data.stored_px=64" in said
    # All is there: nothing is asked for, and nothing is written.
    handler.asked.clear()
    before = {path: path.stat().st_mtime_ns for path in (out / "aligned").iterdir()}
    assert main(command) == 0
    assert handler.asked == []
    assert {path: path.stat().st_mtime_ns for path in (out / "aligned").iterdir()} == before
    # One file is missing: only that one is asked for, after the first that tells the layout.
    (out / "photographs" / "images" / "002_neutral.jpg").unlink()
    assert main(command) == 0
    assert handler.asked == ["/inst/neutral_front/001_03.jpg", "/inst/neutral_front/002_03.jpg"]
    assert main(["data", "audit", str(out), "data.stored_px=64", "--labels-only"]) == 0


def test_a_file_with_another_sum_is_refused_and_not_kept(mirror, serve, tmp_path, capsys):
    url, _ = serve(mirror)
    file = mirror / "inst/smiling_front/002_08.jpg"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes() + b"x")
    command = ["data", "fetch", "london", "--url", url, "--out", str(tmp_path / "out"), "--px", "64"]
    assert main(command) == 1
    said = capsys.readouterr().err
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert f"{url}/inst/smiling_front/002_08.jpg: has sha256 {found}, expected {expected}" in said
    here = tmp_path / "out" / "photographs" / "images"
    assert not (here / "002_smiling.jpg").exists()
    assert not (tmp_path / "out" / "labels.csv").exists()
    file.write_bytes(file.read_bytes()[:-1])
    assert main(command) == 0
    # A file that was damaged here is named with the command that removes it.
    (here / "001_neutral.jpg").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(command) == 1
    remedy = capsys.readouterr().err.split("give the command again: ")[1].strip()
    program, path = shlex.split(remedy)
    assert program == "rm"
    Path(path).unlink()
    assert main(command) == 0


def test_servers_that_refuse_or_do_not_answer(mirror, serve, tmp_path, capsys):
    url, handler = serve(mirror)
    out = str(tmp_path / "out")
    handler.faults["/inst/neutral_front/001_03.jpg"] = ["403"]
    assert main(["data", "fetch", "london", "--url", url, "--out", out]) == 1
    assert handler.asked == ["/inst/neutral_front/001_03.jpg"]
    handler.faults["/inst/neutral_front/003_03.jpg"] = ["500"] * 3
    assert main(["data", "fetch", "london", "--url", url, "--out", out, "--px", "64"]) == 1
    assert "HTTP Error 500" in capsys.readouterr().err
    assert handler.asked.count("/inst/neutral_front/003_03.jpg") == 3
    assert main(["data", "fetch", "london", "--url", f"{url}/elsewhere", "--out", out]) == 2
    assert "has neither inst/neutral_front/001_03.jpg nor" in capsys.readouterr().err
    assert main(["data", "fetch", "london", "--url", "http://127.0.0.1:9", "--out", out]) == 1
    assert "HTTPS_PROXY" in capsys.readouterr().err
    assert main(["data", "fetch", "london", "--url", "elsewhere", "--out", out]) == 2


def test_a_proxy_of_the_environment_is_used(mirror, serve, monkeypatch):
    url, handler = serve(mirror)
    monkeypatch.setenv("http_proxy", url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert london._get("http://photographs.invalid/inst/neutral_front/001_03.jpg") is None
    assert handler.asked == ["http://photographs.invalid/inst/neutral_front/001_03.jpg"]


@pytest.mark.slow
@pytest.mark.needs("photographs")
def test_the_real_photographs_at_600_px(serve, tmp_path):
    from rafce_ray.base.storage import locate

    url, _ = serve(PHOTOGRAPHS)
    made = london.fetch(locate(tmp_path / "out"), AlignSettings(), url)
    assert len(made.records) == 172
    assert len(made.left_out) <= 2
    faces = io.BytesIO((tmp_path / "out" / "aligned" / "001_smiling.jpg").read_bytes())
    with Image.open(faces) as face:
        assert face.size == (224, 224)
