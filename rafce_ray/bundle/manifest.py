"""The parts of a bundle's folder that are read before anything is built of them: its manifest, and files by their sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rafce_ray.base.errors import RafceError
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, Taxonomy, action_unit_code, parse_action_unit_token

FORMAT_VERSION = 4
"""Version of the layout that this code writes. It also reads version 1, which had no association, 2, which had no canary, and 3, which had no
reference for drift."""

MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"
CANARY = "canary.safetensors"
MODEL_CARD = "MODEL_CARD.md"

Record = TypeVar("Record")

_KEYS = frozenset(
    {
        "format_version",
        "weights",
        "canary",
        "taxonomy",
        "architecture",
        "preprocessing",
        "calibration",
        "association",
        "drift_reference",
        "metrics",
        "provenance",
    }
)
_PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz"})
_PICKLE_STARTS = (*(b"\x80" + bytes([protocol]) for protocol in range(2, 6)), b"PK\x03\x04")


class BundleError(RafceError):
    """A folder is no bundle that may be used; the message says which file, what was found and what was expected."""


def refuse_pickles(folder: Path) -> None:
    """BundleError where a file below the folder looks like a pickle."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb") as stream:
            start = stream.read(4)
        if path.suffix.lower() in _PICKLE_SUFFIXES or start.startswith(_PICKLE_STARTS):
            raise BundleError(
                f"{path}: looks like a pickle, which can run any code when it is read. A bundle holds JSON, "
                "safetensors and Markdown only: get it from its source again, or remove the file if you know what it is."
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """``bundle.json`` with the keys of the newest version. BundleError where it cannot be read, or has other keys."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error}). Give a bundle folder.") from None
    except ValueError as error:
        raise BundleError(
            f"{path}: is not JSON ({error}): the file is cut short or altered. Get the bundle again."
        ) from None
    if not isinstance(manifest, dict):
        raise BundleError(f"{path}: holds a {type(manifest).__name__}, expected an object. Get the bundle again.")
    version = manifest.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise BundleError(
            f"{path}: format_version is {version!r}; this program reads 1 to {FORMAT_VERSION}. "
            "Use the version of rafce_ray that wrote it, or train again."
        )
    if version == 1:
        manifest.setdefault("association", None)
    if version in (1, 2):
        manifest.setdefault("canary", None)
    if version in (1, 2, 3):
        manifest.setdefault("drift_reference", None)
    if manifest.keys() != _KEYS:
        missing, unknown = sorted(_KEYS - manifest.keys()), sorted(manifest.keys() - _KEYS)
        raise BundleError(
            f"{path}: missing keys {missing}, unknown keys {unknown}. Get the bundle again from its source."
        )
    return manifest


def section(folder: Path, manifest: Mapping[str, Any], key: str, read: Callable[[Any], Record]) -> Record:
    """One section of the manifest as its record; whatever does not fit is a BundleError that names file and key."""
    try:
        return read(manifest[key])
    except (ValidationError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = repr(error)
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise BundleError(
            f"{folder / MANIFEST}: {key} cannot be read: {reason}. Get the bundle again from its source."
        ) from None


def describe_file(name: str, content: bytes) -> dict[str, Any]:
    """The entry of a file in the manifest."""
    return {"file": name, "num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_file(folder: Path, manifest: Mapping[str, Any], key: str, name: str) -> bytes:
    """The content of the file that the manifest's ``key`` describes, which must be called ``name``, after its sha256 was checked.

    Raises:
        BundleError: it cannot be read, or is not the one that the manifest describes.
    """
    path = folder / name
    file, num_bytes, sha256 = section(
        folder, manifest, key, lambda entry: (entry["file"], int(entry["num_bytes"]), str(entry["sha256"]))
    )
    if file != name:
        raise BundleError(f"{folder / MANIFEST}: {key}.file is {file!r}, expected {name!r}. Get the bundle again.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error}). Get the bundle again.") from None
    if len(content) != num_bytes:
        raise BundleError(
            f"{path}: has {len(content):,} bytes instead of {num_bytes:,}: cut short or altered. Get the bundle again."
        )
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise BundleError(f"{path}: was altered: sha256 {found[:12]}… instead of {sha256[:12]}…. Get the bundle again.")
    return content


def taxonomy_to_plain(taxonomy: Taxonomy) -> dict[str, Any]:
    """A taxonomy as plain JSON values, names beside codes."""
    return {
        "emotions": [
            {"index": index, "label": label, "components": components}
            for index, (label, components) in enumerate(zip(taxonomy.emotions, taxonomy.components, strict=True))
        ],
        "action_units": [
            {"code": action_unit_code(number), "name": ACTION_UNIT_NAMES.get(number)}
            for number in taxonomy.action_units
        ],
    }


def taxonomy_from_plain(plain: Any) -> Taxonomy:
    """The taxonomy that :func:`taxonomy_to_plain` wrote. ValueError, TypeError or KeyError where it cannot be read."""
    emotions = sorted(plain["emotions"], key=lambda entry: int(entry["index"]))
    if [entry["index"] for entry in emotions] != list(range(len(emotions))):
        raise ValueError("the indices of the emotions are not 0, 1, 2, ...")
    numbers = [parse_action_unit_token(entry["code"]) for entry in plain["action_units"]]
    if None in numbers:
        raise ValueError(f"{[entry['code'] for entry in plain['action_units']]} are not all action units")
    return Taxonomy(
        emotions=tuple(str(entry["label"]) for entry in emotions),
        components=tuple(
            None if entry["components"] is None else (str(entry["components"][0]), str(entry["components"][1]))
            for entry in emotions
        ),
        action_units=tuple(number for number in numbers if number is not None),
    )
