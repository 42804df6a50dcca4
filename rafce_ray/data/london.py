"""The Face Research Lab London Set, downloaded and aligned: 102 people, each with a neutral and a smiling photograph.

Lisa DeBruine and Benedict Jones (2017), figshare 5047666, CC BY 4.0. The people gave signed consent. ``london.csv``
has what is known of each person, the split, and the sha256 of both photographs: as they are in the repository
debruine/webmorphR.stim, and of copies at 600 px, which a mirror may have of 86 people. docs/explanation/decisions.md
says where the sums are from.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import build_opener

from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import PAUSES_S, Location
from rafce_ray.config import build_config
from rafce_ray.data.align import Aligned, AlignSettings, alignment_folder, cut_faces
from rafce_ray.data.labels import read_labels
from rafce_ray.data.records import Progress, advancing
from rafce_ray.data.split import csv_bytes

COMMIT = "fa8b78fda2d659bb74ce62fcd99c4407551d2a77"
REPOSITORY = f"https://raw.githubusercontent.com/debruine/webmorphR.stim/{COMMIT}"

MANIFEST = Path(__file__).with_name("london.csv")

PHOTOGRAPHS, IMAGES, SLICES, ATTRIBUTION = "photographs", "images", "slices.csv", "ATTRIBUTION.md"
"""The folder of what was downloaded and the one in it that holds the photographs, and the files next to it."""

_EMOTIONS = ("neutral", "smiling")
_TIMEOUT_S = 30.0
_DOWNLOADS = 8
"""Files that are downloaded at once."""

_ATTRIBUTION = f"""\
# Attribution

Photographs: Face Research Lab London Set, Lisa DeBruine and Benedict Jones (2017), figshare,
https://doi.org/10.6084/m9.figshare.5047666
Licence: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/
Downloaded from: https://github.com/debruine/webmorphR.stim, commit {COMMIT}, or a mirror of it.
Changes: `aligned/` holds the faces, cut out, turned level and scaled. The splits are rafce_ray's.

The people gave signed consent for their photographs to be used in lab-based and web-based studies, in original or
altered forms, and to illustrate research.
Age, gender and ethnicity in `slices.csv` are self-reported.
"""


@dataclass(frozen=True)
class Copy:
    """One way in which a server may hold the photographs: their paths by emotion, and the end of the sums' columns."""

    paths: Mapping[str, str]
    sums: str


COPIES = (
    Copy({"neutral": "inst/neutral_front/{}_03.jpg", "smiling": "inst/smiling_front/{}_08.jpg"}, ""),
    Copy({one: f"london_photos/images/{{}}_{one}.jpg" for one in _EMOTIONS}, "_600px"),
)


@dataclass(frozen=True)
class Photograph:
    """A photograph: ``name`` here, ``path`` on the server, and a row of ``london.csv`` about the person."""

    name: str
    path: str
    sha256: str
    emotion: str
    person: Mapping[str, str]


def photographs(copy: Copy) -> list[Photograph]:
    """All photographs that this copy has, by person."""
    with MANIFEST.open(encoding="utf-8", newline="") as stream:
        people = list(csv.DictReader(stream))
    return [
        Photograph(f"{one['person']}_{emotion}.jpg", copy.paths[emotion].format(one["person"]), sha256, emotion, one)
        for one in people
        for emotion in _EMOTIONS
        if (sha256 := one[emotion + copy.sums])
    ]


def fetch(out: Location, settings: AlignSettings, url: str = REPOSITORY, progress: Progress | None = None) -> Aligned:
    """Download what is missing in ``out``, a local folder, check every file, and align the faces.

    ``url``: the repository, or a server with the same paths or with ``london_photos/images/001_neutral.jpg``. Proxies
    are those of the environment (``HTTPS_PROXY``).

    Raises:
        UsageError: the server has no photographs, or ``out`` holds something else.
        RafceError: the server does not answer, or a file has another sha256.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url {url}: is no address. Give one such as {REPOSITORY}")
    base = url.rstrip("/")
    with alignment_folder(out, settings, "london"):
        folder = out / PHOTOGRAPHS
        wanted = _wanted(base, folder / IMAGES)
        _download(base, wanted, folder / IMAGES, progress)
        labels = [
            (one.name, one.person["split"], one.emotion, str(int(one.emotion == "smiling")), one.person["person"])
            for one in wanted
        ]
        about = ("age", "gender", "ethnicity")
        slices = [(one.name, *(one.person[column] for column in about)) for one in wanted]
        for file, content in (
            (folder / "labels.csv", csv_bytes(("name", "split", "emotion", "AU12", "person"), labels)),
            (out / SLICES, csv_bytes(("name", *about), slices)),
            (out / ATTRIBUTION, _ATTRIBUTION.encode()),
        ):
            if not file.exists():
                file.write_bytes(content)
        data = build_config({"data": {"root": folder.path}}).data
        return cut_faces(data, read_labels(data), out, settings, progress)


def _wanted(base: str, folder: Location) -> list[Photograph]:
    """The photographs of the copy that is in the folder as a whole or, if there is none, of the one on the server."""
    copies = [photographs(copy) for copy in COPIES]
    for wanted in copies:
        if all((folder / one.name).exists() for one in wanted) and _sha256(folder / wanted[0].name) == wanted[0].sha256:
            return wanted
    for wanted in copies:
        if _get(f"{base}/{wanted[0].path}", patient=False) is not None:
            return wanted
    paths = " nor ".join(wanted[0].path for wanted in copies)
    raise UsageError(f"--url {base}: has neither {paths}. Give a mirror of {REPOSITORY}")


def _sha256(file: Location) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _download(base: str, wanted: Sequence[Photograph], folder: Location, progress: Progress | None) -> None:
    missing = []
    for one in wanted:
        file = folder / one.name
        if not file.exists():
            missing.append(one)
        elif (found := _sha256(file)) != one.sha256:
            raise RafceError(
                f"{file.shown}: has sha256 {found}, expected {one.sha256}. Remove it, and give the command again: rm "
                f"{file.command}"
            )

    def download(one: Photograph) -> None:
        address = f"{base}/{one.path}"
        content = _get(address)
        if content is None:
            raise RafceError(f"{address}: is not there. Give another mirror: --url BASE")
        found = hashlib.sha256(content).hexdigest()
        if found != one.sha256:
            raise RafceError(
                f"{address}: has sha256 {found}, expected {one.sha256}. It was not kept. Give the command again, or "
                "another mirror: --url BASE"
            )
        (folder / one.name).write_bytes(content)

    with ThreadPoolExecutor(_DOWNLOADS) as pool, advancing(progress, "downloading", len(missing)) as advance:
        # An error cancels the downloads that have not begun.
        for _ in pool.map(download, missing):
            advance(1)


def _get(address: str, *, patient: bool = True) -> bytes | None:
    """A file of a server, None where it is not there (404). Retries what may pass.

    ``patient=False``: a server that does not answer at all is not retried, as the address may be wrong.

    Raises:
        RafceError: the server refuses, or does not answer.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            with build_opener().open(address, timeout=_TIMEOUT_S) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            if error.code not in (408, 429) and error.code < 500:
                pause_s = None
            reason: Exception = error
        except (OSError, HTTPException) as error:
            reason, pause_s = error, pause_s if patient else None
        if pause_s is None:
            break
        time.sleep(pause_s)
    raise RafceError(
        f"{address}: cannot be downloaded ({reason}). Check the network, name a proxy in HTTPS_PROXY, or give a "
        "mirror: --url BASE. What was downloaded is kept."
    ) from reason
