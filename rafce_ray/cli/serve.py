"""``rafce serve``: serve a bundle over HTTP on Ray Serve."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rafce_ray.base.errors import UsageError
from rafce_ray.cli.arguments import BUNDLE_HELP, command

if TYPE_CHECKING:
    from rafce_ray.service.config import ServiceConfig


@command
def main(argv: list[str]) -> int:
    """``rafce serve``; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    if arguments.replicas < 1 or not 0 < arguments.port < 2**16:
        given = f"--replicas {arguments.replicas} --port {arguments.port}"
        raise UsageError(f"{given}: at least one replica, and a port from 1 to 65535.")
    config = _config(arguments)
    from rafce_ray.serve.launch import serve_until_stopped

    serve_until_stopped(config, arguments.host, arguments.port, arguments.replicas, dashboard=arguments.dashboard)
    return 0


def _config(arguments: argparse.Namespace) -> ServiceConfig:
    """The service's configuration from the command line. ConfigError for what cannot be used."""
    from rafce_ray.base.hardware import is_loopback
    from rafce_ray.base.storage import locate
    from rafce_ray.config import apply_overrides
    from rafce_ray.service.config import ServiceConfig, read_service_config

    loopback = is_loopback(arguments.host)
    if not loopback and arguments.keys is None:
        raise UsageError(
            f"--host {arguments.host} lets other machines connect, which needs keys. Make one with: python -m "
            "rafce_ray.service.keys new NAME --file keys.json, and give --keys keys.json; or leave --host out."
        )
    values: dict[str, Any] = {"engine": arguments.engine, "loopback_only": loopback}
    for key, value in (("bundle", arguments.bundle), ("registry", arguments.registry)):
        if value is not None:
            # Replicas may run in another folder.
            values[key] = locate(value).uri
    if arguments.keys is not None:
        values["keys_file"] = str(Path(arguments.keys).absolute())
    return read_service_config(apply_overrides(values, arguments.overrides, ServiceConfig))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce serve", description="Serve a model over HTTP on this machine with Ray Serve, until Ctrl-C."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", metavar="PATH", help=BUNDLE_HELP)
    source.add_argument("--registry", metavar="PATH", help="registry whose live version is served (see rafce bundle)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only); others need --keys"
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the endpoint (default: 8000)")
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="number of processes, each with the model (default: 1)"
    )
    parser.add_argument("--engine", default="auto", help="auto, torch, openvino or onnxruntime")
    parser.add_argument(
        "--dashboard",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start Ray's dashboard, for this machine only; rafce monitor needs it to find the service",
    )
    parser.add_argument(
        "--keys", metavar="FILE", help="file of hashed API keys, made by python -m rafce_ray.service.keys"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="keys of the service, for example limits.max_requests=128"
    )
    return parser
