"""A version in a few plain values, as it is listed: for tables, JSON and the service."""

from __future__ import annotations

from typing import Any

from rafce_ray.registry.live import LiveRecord
from rafce_ray.registry.versions import Version


def summary_of(version: Version, live: LiveRecord | None) -> dict[str, Any]:
    """Names, sizes and figures of a version from its manifest; None where it does not tell."""
    manifest = version.manifest
    taxonomy, metrics = _section(manifest, "taxonomy"), _section(manifest, "metrics")
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
        "split": metrics.get("split"),
        "num_images": metrics.get("num_images"),
        "score": metrics.get("score"),
        "score_interval": _section(metrics, "intervals").get("score"),
        "accuracy": metrics.get("accuracy"),
        "macro_f1_supported": metrics.get("macro_f1_supported"),
        "au_f1_mean": metrics.get("au_f1_mean"),
        "data_fingerprint": _section(manifest, "provenance").get("data_fingerprint"),
        "problem": version.problem,
    }


def _section(record: dict[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def _names(entries: object, key: str) -> list[str]:
    return [str(entry.get(key)) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
