"""Bundles kept under a name: copied whole into ``versions/NAME/``, verified, and never altered after that."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rafce_ray.base.errors import RafceError, UsageError, did_you_mean
from rafce_ray.base.storage import Location, StorageError
from rafce_ray.bundle.bundle import MANIFEST, BundleError, find_bundle, load_bundle
from rafce_ray.registry.live import LiveRecord

VERSIONS = "versions"
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Names of versions: no path out of the registry."""

SHORT_SHA = 12
"""Digits of the weights' sha256 that name a version by default."""

_NAMES = "names are 1 to 64 letters, digits, dots, dashes and underscores, and start with a letter or digit."


@dataclass(frozen=True)
class Version:
    """A version by its manifest; if that is broken, ``problem`` says how. ``added``: UTC, None where unknown."""

    name: str
    added: datetime | None
    manifest: dict[str, Any]
    problem: str | None = None

    @property
    def sha256(self) -> str | None:
        """Of the weights, from the manifest."""
        return _section(self.manifest, "weights").get("sha256")


def is_name(text: str) -> bool:
    """Whether a version may have this name."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def place_of_version(registry: Location, name: str) -> Location:
    """The folder for the bundle of a version. UsageError where no version can have this name."""
    if not is_name(name):
        raise UsageError(f"version {name!r}: {_NAMES}")
    return registry / VERSIONS / name


def version_folder(registry: Location, name: str) -> Location:
    """The bundle of a version. UsageError where there is no such version, or none can have this name."""
    folder = place_of_version(registry, name)
    if not (folder / MANIFEST).exists():
        known = version_names(registry)
        there = f"There are {', '.join(known)}." if known else "There is none yet: add one with rafce bundle add."
        raise UsageError(f"{registry.shown}: there is no version {name!r}{did_you_mean(name, known) or '.'} {there}")
    return folder


def version_names(registry: Location) -> list[str]:
    """Names of all versions, sorted."""
    folder = registry / VERSIONS
    names = [info.base_name for info in folder.list() if not info.is_file and is_name(info.base_name)]
    return [name for name in names if (folder / name / MANIFEST).exists()]


def list_versions(registry: Location) -> list[Version]:
    """Every version, the newest last; a broken one is listed with its problem."""
    found = [read_version(registry, name) for name in version_names(registry)]
    return sorted(found, key=lambda version: (version.added is not None, version.added, version.name))


def read_version(registry: Location, name: str) -> Version:
    """A version by name, from its manifest alone. UsageError where there is none."""
    file = version_folder(registry, name) / MANIFEST
    added = file.info().mtime
    try:
        manifest = json.loads(file.read_bytes())
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        return Version(name, added, {}, f"{MANIFEST} cannot be read ({error}).")
    if isinstance(manifest, dict):
        return Version(name, added, manifest)
    return Version(name, added, {}, f"{MANIFEST} holds a {type(manifest).__name__}, expected an object.")


def add_version(registry: Location, source: str, name: str | None = None) -> tuple[str, bool]:
    """Copy a bundle, or that of a run folder, into the registry; returns its name and whether it is new.

    The default name is the start of its weights' sha256. A version with the same name and content stays as it is.
    BundleError where the bundle or its copy may not be used; UsageError where the name is invalid or another bundle's.
    """
    if name is not None:
        place_of_version(registry, name)
    place = find_bundle(source)
    with tempfile.TemporaryDirectory() as scratch:
        # The checked bundle is the copied one, even if the source changes meanwhile.
        copy = Path(scratch) / "bundle"
        place.download(copy)
        try:
            bundle = load_bundle(copy)
        except BundleError as error:
            raise BundleError(str(error).replace(str(copy), place.shown)) from None
        version = name or bundle.weights_sha256[:SHORT_SHA]
        folder = registry / VERSIONS / version
        is_new = not (folder / MANIFEST).exists()
        if is_new:
            # The manifest is written last: a folder without one was left by a program that died.
            folder.delete()
            try:
                folder.upload(copy)
            except StorageError:
                raise
            except OSError as error:
                detail = f"cannot be written ({error}). Look what is there, and try again."
                raise RafceError(f"{folder.shown}: {detail}") from error
        # A manifest has its weights' sha256, so it identifies the bundle.
        if (folder / MANIFEST).read_bytes() != (copy / MANIFEST).read_bytes():
            raise UsageError(
                f"{folder.shown}: this version is there already and is another bundle; versions are never altered. "
                "Give the new one a name of its own with --as NAME."
            )
    if is_new:
        try:
            load_bundle(folder)
        except BundleError as error:
            raise BundleError(
                f"{error} What was stored is not what was copied: the storage failed, or another program stored under "
                "this name at the same time. Remove the folder and add the bundle again."
            ) from error
    return version, is_new


def summary_of(version: Version, live: LiveRecord | None) -> dict[str, Any]:
    """Names, sizes and figures of a version from its manifest; None where it has none."""
    manifest = version.manifest
    taxonomy, metrics = _section(manifest, "taxonomy"), _section(manifest, "metrics")
    figures = ("split", "num_images", "score", "accuracy", "macro_f1_supported", "au_f1_mean")
    return {
        "version": version.name,
        "is_live": live is not None and live.version == version.name,
        "added": None if version.added is None else version.added.isoformat(timespec="seconds"),
        "sha256": version.sha256,
        "num_bytes": _section(manifest, "weights").get("num_bytes"),
        "format_version": manifest.get("format_version"),
        "backbone": _section(manifest, "architecture").get("backbone"),
        "image_px": _section(manifest, "architecture").get("image_px"),
        "emotions": _names(taxonomy.get("emotions"), "label"),
        "action_units": _names(taxonomy.get("action_units"), "code"),
        **{name: metrics.get(name) for name in figures},
        "score_interval": _section(metrics, "intervals").get("score"),
        "data_fingerprint": _section(manifest, "provenance").get("data_fingerprint"),
        "problem": version.problem,
    }


def _section(record: dict[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _names(entries: object, key: str) -> list[str]:
    return [str(entry.get(key)) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
