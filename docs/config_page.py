"""Every key of every configuration as one Markdown page, from the code: ``python docs/config_page.py >
docs/config.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rafce_ray.config import Config, flatten, kinds_of, load_config, recipe_names, section_of
from rafce_ray.service.config import ServiceConfig
from rafce_ray.study.config import StudyConfig
from rafce_ray.study.space import HOW_TO_WRITE

UNITS = {
    "_px": "px",
    "_pixels": "pixels",
    "_bytes": "bytes",
    "_s": "s",
    "_steps": "steps",
    "epochs": "epochs",
    "_epoch": "epochs",
    "patience": "epochs",
    "grace_period": "epochs",
    "_images": "images",
    "_faces": "faces",
    "batch_size": "images",
}
"""Unit of a key by its last part's ending, as this project names things."""

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", NoneType: "null"}

HEAD = """# Configuration

Every key that can be set, with its type, default and range.
`python docs/config_page.py > docs/config.md` writes this page from the code, and a test compares both.
An unknown key, a wrong type or a value out of range is an error.
It names the key, what was found, what was expected and the nearest known key. All faults are reported at once.

On the command line, a key whose type is text takes the text after `=` as it is, also `~`, `#`, `[` and `: `.
`null` or nothing after `=` is null where the key may be null; `'key="null"'`, in quotes, is the text.

All other values, and YAML and JSON files, are read as YAML 1.2.
So `010` is 10, `1e-3` is a number, and `no`, `12:30` and `2026-11-25` are text.
In a file, `optim.lr: 1e-3` is the same as `optim: {lr: 1e-3}`.
A key that is set twice is an error that names both lines.
"""

PARTS: tuple[tuple[str, type[BaseModel], str], ...] = (
    (
        "A run",
        Config,
        "`rafce train`: `section.key=value` on the command line, or the sections of a YAML file (`--config FILE`). "
        "Precedence: defaults, then `--recipe`, then the file, then the command line. `rafce train --print-config` "
        "shows all of them, resolved.",
    ),
    (
        "A study",
        StudyConfig,
        "`rafce tune --config FILE`: a YAML file, with `key=value` over it. `base.SECTION.KEY=value` sets a run's key "
        "for every trial, `space.SECTION.KEY=DOMAIN` what is searched, `space.SECTION.KEY=null` takes a key out of the "
        f"search. A domain is written as `{HOW_TO_WRITE}`; `when: {{other.key: [values]}}` next to it makes it apply "
        "only where other keys have these values.",
    ),
    (
        "A service",
        ServiceConfig,
        "`rafce serve`: `key=value` on the command line, and `args` of an application in `serve/*.yaml`. `--bundle`, "
        "`--registry`, `--engine` and `--keys` set `bundle`, `registry`, `engine` and `keys_file`.",
    ),
)


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, model, how in PARTS:
        parts += [f"## {title}\n", f"{how}\n", *_tables(model)]
        if model is Config:
            parts += ["### Recipes\n", _recipes()]
    return "\n".join(parts)


def _tables(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The model's own keys as a table, then its sections."""
    own = {name: field for name, field in model.model_fields.items() if section_of(field) is None}
    if own:
        yield _table([_row(f"{prefix}{name}", field) for name, field in own.items()])
    for name, field in model.model_fields.items():
        section = section_of(field)
        if section is not None:
            yield f"### `{prefix}{name}`\n"
            yield f"{(section.__doc__ or '').strip().splitlines()[0]}\n"
            yield from _tables(section, f"{prefix}{name}.")


def _table(rows: list[tuple[str, ...]]) -> str:
    head = ("key", "type", "default", "range", "unit", "meaning")
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"


def _row(key: str, field: FieldInfo) -> tuple[str, ...]:
    default = "required" if field.is_required() else f"`{_plain(field.get_default())}`"
    return (f"`{key}`", _type(field.annotation), default, _range(field), _unit(key), field.description or "")


def _type(annotation: Any) -> str:
    options = list(dict.fromkeys(_options(annotation)))
    if "null" in options:
        options = [*(one for one in options if one != "null"), "null"]
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _options(annotation: Any) -> Iterator[str]:
    """What a value may be, one after the other."""
    for kind in kinds_of(annotation):
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            yield from (f"`{_plain(value)}`" for value in arguments)
        elif origin is tuple:
            yield (
                f"list of {_type(arguments[0])}s" if arguments[0] in (int, float) else f"list of {_type(arguments[0])}"
            )
        elif origin is dict:
            yield "mapping"
        else:
            yield _TYPES[kind]


def _range(field: FieldInfo) -> str:
    parts = []
    for one in field.metadata:
        parts += [f"{sign} {getattr(one, name):,}" for name, sign in _BOUNDS.items() if hasattr(one, name)]
        if getattr(one, "pattern", None) is not None:
            parts.append(f"`{one.pattern}`")
    return ", ".join(parts)


def _unit(key: str) -> str:
    return next((unit for ending, unit in UNITS.items() if key.endswith(ending)), "")


def _plain(value: Any) -> str:
    """A value as YAML has it, without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _recipes() -> str:
    """What each recipe sets otherwise than the defaults."""
    defaults, lines = flatten(Config()), ["| recipe | differs from the defaults in |", "| --- | --- |"]
    for name in recipe_names():
        values = flatten(load_config(recipe=name))
        changed = [f"`{key}={_plain(value)}`" for key, value in values.items() if value != defaults[key]]
        lines.append(f"| `{name}` | {', '.join(changed) or 'nothing'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
