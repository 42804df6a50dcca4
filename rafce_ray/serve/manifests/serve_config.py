"""A configuration of Ray Serve (``serve/*.yaml``, ``serveConfigV2``) against Serve's schema and the service's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from rafce_ray.config import ConfigError
from rafce_ray.config_errors import did_you_mean
from rafce_ray.serve.deployment import SETTINGS, read_live_version
from rafce_ray.serve.manifests.documents import MISSING, Fault, Place, at
from rafce_ray.service.config import read_service_config

BUILDER = "rafce_ray.serve.deployment:build_app"


def serve_faults(config: Any, place: Place = ()) -> Iterator[Fault]:
    """What Serve would refuse, and what it would take without a word: keys that it does not know."""
    if not isinstance(config, dict):
        yield Fault(place, repr(config), "a mapping with the key applications")
        return
    yield from _unknown_keys(config, ServeDeploySchema, place)
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        yield from _refused(error, config, place)
        return
    for number, application in enumerate(config["applications"]):
        yield from _application_faults(application, (*place, "applications", number))


def _unknown_keys(values: Any, annotation: Any, place: Place) -> Iterator[Fault]:
    """Keys that no field of the models of ``annotation`` has; mappings that take anything are not looked into."""
    models = list(_models(annotation))
    if isinstance(values, list):
        for index, value in enumerate(values):
            yield from _unknown_keys(value, annotation, (*place, index))
    if not isinstance(values, dict) or not models:
        return
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    for key, value in values.items():
        if key in fields:
            yield from _unknown_keys(value, fields[key].annotation, (*place, key))
        else:
            known = f"a key of {models[0].__name__}{did_you_mean(str(key), list(fields))}"
            yield Fault(
                (*place, str(key)), "an unknown key", known, "Serve would take it without a word, and do nothing."
            )


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _refused(error: ValidationError, config: Any, place: Place) -> Iterator[Fault]:
    for fault in error.errors():
        if fault["type"] == "extra_forbidden":
            continue
        # Pydantic also names the alternatives that it tried.
        where: Place = ()
        for part in fault["loc"]:
            if at(config, *where, part) is MISSING and fault["type"] != "missing":
                break
            where = (*where, part)
        found = "nothing" if fault["type"] == "missing" else repr(fault["input"])
        yield Fault((*place, *where), found, fault["msg"].removeprefix("Value error, ").rstrip("."))


def _application_faults(application: Mapping[str, Any], place: Place) -> Iterator[Fault]:
    builder = application.get("import_path")
    if builder != BUILDER:
        yield Fault((*place, "import_path"), repr(builder), repr(BUILDER))
        return
    try:
        read_service_config(application.get("args", {}))
    except ConfigError as error:
        yield Fault((*place, "args"), "arguments that the service refuses", f"a ServiceConfig: {error}")
    for index, deployment in enumerate(application.get("deployments", ())):
        here = (*place, "deployments", index)
        if deployment["name"] != SETTINGS["name"]:
            yield Fault(
                (*here, "name"), repr(deployment["name"]), f"{SETTINGS['name']!r}, the only deployment there is"
            )
        if deployment.get("user_config") is not None:
            try:
                read_live_version(deployment["user_config"])
            except ConfigError as error:
                yield Fault((*here, "user_config"), repr(deployment["user_config"]), str(error))
