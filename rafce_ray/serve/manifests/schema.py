"""A Kubernetes object against its schema: misspelt keys, wrong types, what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError

from rafce_ray.config_errors import did_you_mean
from rafce_ray.serve.manifests.documents import Fault

SCHEMA = Path(__file__).with_name("kuberay.yaml")


@lru_cache
def schemas() -> dict[str, Any]:
    """Definitions by name; those of the kinds that are known have a ``kind`` of that name."""
    return dict(yaml.safe_load(SCHEMA.read_text())["$defs"])


def known_kinds() -> list[str]:
    """Kinds of objects that have a schema here."""
    return [name for name, schema in schemas().items() if schema.get("properties", {}).get("kind") == {"const": name}]


def schema_faults(content: Any, kind: str) -> Iterator[Fault]:
    """What the API server would refuse, or drop without a word: a key that no field has."""
    validator = Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schemas()})
    for error in validator.iter_errors(content):
        yield from _faults_of(error)


def _faults_of(error: ValidationError) -> Iterator[Fault]:
    place, wanted = tuple(error.absolute_path), error.validator_value
    schema: Any = error.schema
    match error.validator:
        case "additionalProperties":
            known = list(schema["properties"])
            for key in error.instance:
                if key not in known:
                    nearest = did_you_mean(str(key), known)
                    yield Fault(
                        (*place, str(key)),
                        "an unknown key",
                        f"one of {', '.join(known)}{nearest}",
                        "Kubernetes would drop it without a word.",
                    )
        case "required":
            for key in wanted:
                if key not in error.instance:
                    yield Fault((*place, key), "nothing", _meaning(schema["properties"].get(key, {})))
        case "const" | "enum":
            choices = [wanted] if error.validator == "const" else wanted
            yield Fault(place, repr(error.instance), " or ".join(map(repr, choices)))
        case _:
            yield Fault(place, _shown(error.instance), _meaning(schema))


def _meaning(schema: Any) -> str:
    """What a schema wants, in words."""
    if "$ref" in schema:
        schema = schemas()[schema["$ref"].rpartition("/")[2]] | {key: schema[key] for key in schema if key != "$ref"}
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    types = [schema["type"]] if "type" in schema else [one["type"] for one in schema.get("anyOf", ()) if "type" in one]
    words = " or ".join(types) or "a value"
    for key, meaning in (
        ("minimum", "of at least"),
        ("maximum", "of at most"),
        ("minItems", "with at least so many items:"),
        ("minLength", "with at least so many characters:"),
        ("pattern", "that matches"),
        ("description", "-"),
    ):
        if key in schema:
            words += f" {meaning} {schema[key]}"
    return words


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
