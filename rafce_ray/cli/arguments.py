"""What verbs share: how they run, and arguments that several of them take. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rafce_ray.base.console import command as command
from rafce_ray.base.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from rafce_ray.config import Config

SPLITS = ("train", "validation", "test")
ENGINES = ("auto", "torch", "openvino", "onnxruntime")
DEVICE_HELP = "auto, cpu, cuda, cuda:1, ... (default auto)"
BUNDLE_HELP = "bundle folder, or the folder of a finished run; a path or URI"
JSON_HELP = "print the result as one JSON line on standard output"


def unknown_verb(verb: str, known: Iterable[str]) -> str:
    """That there is no such verb, and the nearest one."""
    return f"unknown verb {verb!r}{did_you_mean(verb, list(known))}"


def parse_verb(parser: argparse.ArgumentParser, argv: Sequence[str], known: Iterable[str]) -> None:
    """Exit with 2, and the nearest verb, where the first word of a command with verbs of its own is none of them."""
    if argv and not argv[0].startswith("-") and argv[0] not in (verbs := list(known)):
        parser.error(unknown_verb(argv[0], verbs))


def add_configuration(parser: argparse.ArgumentParser, overrides: str) -> None:
    """The arguments that make a training configuration: ``overrides``, --config and --recipe; and --json."""
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=overrides)
    parser.add_argument("--config", metavar="FILE", help="YAML configuration; it overrides the recipe")
    parser.add_argument("--recipe", metavar="NAME", help=f"predefined configuration: {', '.join(recipe_names())}")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def add_data_overrides(parser: argparse.ArgumentParser, help_: str) -> None:
    """``overrides`` of the section data."""
    parser.add_argument("overrides", nargs="*", metavar="data.KEY=VALUE", help=help_)


def require_data_root(config: Config, prefix: str = "") -> None:
    """UsageError where no data is named; ``prefix`` precedes the key on the command line, such as ``base.``."""
    if config.data.root is None:
        key = f"{prefix}data.root"
        raise UsageError(f"{key} is not set: name the folder of labelled faces, for example {key}=path/to/RAF-CE.")


def recipe_names() -> list[str]:
    """As :func:`rafce_ray.config.recipe_names`, without importing the configuration."""
    return sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")
    return value


def local_path(text: str) -> Path:
    """A path on this machine; an error where it is a URI."""
    if re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+://", text):
        raise argparse.ArgumentTypeError(
            f"{text} is a URI, but this is written to a local disk. Give a local path, and copy the files afterwards."
        )
    return Path(text)
