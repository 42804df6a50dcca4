"""``python -m rafce_ray.serve.manifests FILE ...``: is what stands in these files what Kubernetes, KubeRay, Ray Serve and the service take, and safe?

Objects are looked through by the schemas of KubeRay v1.7 and Kubernetes (misspelt keys, wrong types), then by the rules of this project:
token authentication, network policy, no root, bounded pods, probes, HAProxy's environment, a Serve configuration that Serve and the
service take. A file with ``applications`` is a Serve configuration (serve/production.yaml). ``-`` reads standard input:
``kubectl kustomize kustomize/gpu | python -m rafce_ray.serve.manifests -``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rafce_ray.config_errors import did_you_mean
from rafce_ray.console import run_main, say
from rafce_ray.errors import RafceError, UsageError
from rafce_ray.serve.manifests.clusters import cluster_faults, job_faults
from rafce_ray.serve.manifests.documents import MISSING, Document, Fault, read_documents
from rafce_ray.serve.manifests.pods import ConfigMaps
from rafce_ray.serve.manifests.schema import known_kinds, schema_faults
from rafce_ray.serve.manifests.serve_config import serve_faults
from rafce_ray.serve.manifests.services import CONFIG, differences, service_faults

Wanted = tuple[str, Any] | None
"""The file to whose Serve configuration every RayService's must be equal, and what it says."""


def check(files: Sequence[tuple[str, str]], wanted: Wanted = None) -> tuple[list[str], list[str]]:
    """Faults and remarks, a line each, of files given as name and text.

    Raises:
        UsageError: a file is not YAML.
    """
    documents = [(file, document) for file, text in files for document in read_documents(text, file)]
    config_maps = {
        str(document.content["metadata"]["name"]): document.content.get("data") or {}
        for _, document in documents
        if document.kind == "ConfigMap" and not list(schema_faults(document.content, "ConfigMap"))
    }
    faults, remarks = [], []
    for file, document in documents:
        where = f"{file}:{{}}: {document.name + ': ' if document.name else ''}"
        if document.kind and document.kind not in known_kinds() and not _is_ours(document):
            remark = (
                "kubectl kustomize FOLDER shows what it makes; give that with -."
                if document.kind == "Kustomization"
                else ""
            )
            remarks.append(
                f"{where.format(document.line(()))}not looked through: an object of another kind. {remark}".strip()
            )
            continue
        refused = list(schema_faults(document.content, document.kind)) if document.kind in known_kinds() else []
        # The rules rely on what the schema says of types.
        rest = refused or _faults_of(document, config_maps, wanted)
        if refused:
            remarks.append(
                f"{where.format(document.line(()))}the rules of this project are asked once the schema's faults are mended."
            )
        found = dict.fromkeys((*document.repeated, *rest))
        faults += [f"{where.format(_line(document, fault))}{fault}" for fault in found]
    return faults, remarks


def _is_ours(document: Document) -> bool:
    return str(document.content.get("apiVersion", "")).startswith("ray.io/")


def _line(document: Document, fault: Fault) -> int:
    """The fault's line; of one inside of ``serveConfigV2``, which is a text of its own, the line in the file."""
    if fault.place[: len(CONFIG)] == CONFIG and CONFIG in document.blocks:
        (inner,) = read_documents(document.content["spec"]["serveConfigV2"], "serveConfigV2")
        return document.blocks[CONFIG] + inner.line(fault.place[len(CONFIG) :]) - 1
    return document.line(fault.place)


def _faults_of(document: Document, config_maps: ConfigMaps, wanted: Wanted) -> Iterator[Fault]:
    content = document.content
    if not document.kind:
        if isinstance(content, dict) and "applications" in content:
            yield from serve_faults(content)
        else:
            yield Fault(("kind",), "nothing", "an object with a kind, or a Serve configuration with applications")
        return
    if document.kind not in known_kinds():
        yield Fault(("kind",), repr(document.kind), f"a kind of ray.io/v1{did_you_mean(document.kind, known_kinds())}")
        return
    match document.kind:
        case "RayCluster":
            yield from cluster_faults(content["spec"], ("spec",), config_maps)
        case "RayJob":
            yield from job_faults(content["spec"], config_maps)
        case "RayService":
            config, refused = _serve_config(content["spec"]["serveConfigV2"])
            yield from refused
            yield from service_faults(content["spec"], MISSING if refused else config, config_maps)
            if wanted is not None and config is not MISSING:
                for fault in differences(config, wanted[1], wanted[0]):
                    yield replace(fault, place=(*CONFIG, *fault.place))


def _serve_config(text: str) -> tuple[Any, list[Fault]]:
    """A RayService's ``serveConfigV2`` as plain values, MISSING where it is none, and what is wrong with it."""
    try:
        (inner,) = read_documents(text, "serveConfigV2")
    except (UsageError, ValueError) as error:
        return MISSING, [Fault(CONFIG, "a text that is no configuration", f"one document of YAML ({error})")]
    repeated = [replace(fault, place=(*CONFIG, *fault.place)) for fault in inner.repeated]
    return inner.content, [*repeated, *serve_faults(inner.content, CONFIG)]


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}. Give YAML files, or - for standard input.") from None


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rafce_ray.serve.manifests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: python -m rafce_ray.serve.manifests serve/*.yaml --serve-config serve/production.yaml",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="manifests and Serve configurations; - is standard input"
    )
    parser.add_argument(
        "--serve-config",
        metavar="FILE",
        help="what every RayService's serveConfigV2 must be equal to, but for http_options.host",
    )
    return parser


def _main(argv: Sequence[str]) -> int:
    arguments = _arguments().parse_intermixed_args(argv)
    wanted: Wanted = None
    if arguments.serve_config is not None:
        documents = read_documents(_read(arguments.serve_config), arguments.serve_config)
        if len(documents) != 1 or not isinstance(documents[0].content, dict):
            raise UsageError(
                f"--serve-config {arguments.serve_config}: not one Serve configuration, which is a mapping."
            )
        wanted = (arguments.serve_config, documents[0].content)
    faults, remarks = check([(file, _read(file)) for file in arguments.files], wanted)
    for remark in remarks:
        say(remark)
    if faults:
        raise RafceError("\n  ".join([f"{len(faults)} fault(s):", *faults]))
    say(f"{len(arguments.files)} file(s): no fault found")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Look through the files; returns the exit code: 0 nothing found, 1 faults, 2 a file that cannot be read."""
    return run_main(_main, argv)
