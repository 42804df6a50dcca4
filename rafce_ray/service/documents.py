"""The service's documents: the page at ``/``, ``/docs``, ``/openapi.json`` and a page for each problem.

They are made once, at the start. Nothing in them comes from a request, and no page loads anything from elsewhere.
Addresses are relative: they still work when a proxy puts a prefix before the paths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray import __version__
from rafce_ray.bundle.model import plain
from rafce_ray.bundle.model_card import PERCEIVED
from rafce_ray.service.admin import Promote, Reload, Rollback
from rafce_ray.service.answers import NoImageRead, PredictAnswer, ReadyStatus, Result, Status, to_json
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.model_info import ModelInfo
from rafce_ray.service.open_inference import InferAnswer, InferError, InferModel, InferRequest
from rafce_ray.service.problems import (
    MEDIA_TYPE,
    PROBLEM_TYPES,
    Problem,
    ProblemDocument,
    problem_document,
)
from rafce_ray.service.requests import Options, PredictRequest

Document = dict[str, Any]

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
"""Of a page's files, by the end of their names."""

_RECORDS: tuple[Any, ...] = (
    PredictAnswer,
    PredictRequest,
    ProblemDocument,
    NoImageRead,
    ModelInfo,
    Status,
    ReadyStatus,
    InferRequest,
    InferAnswer,
    InferModel,
    InferError,
    Reload,
    Promote,
    Rollback,
)

_NOT_OF_PREDICT = {"not_found", "method_not_allowed", "unknown_method", "not_ready", "scope_missing", "client_gone"}
_NOT_OF_PREDICT |= {"change_refused", "no_such_version"}
_PREDICT_PROBLEMS = tuple(code for code in PROBLEM_TYPES if code not in _NOT_OF_PREDICT)


_TEMPLATES = Environment(
    loader=PackageLoader("rafce_ray.service", "templates"),
    autoescape=lambda name: name is not None and ".html" in name,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.policies["json.dumps_kwargs"] = {"sort_keys": False}


def document_routes(config: ServiceConfig) -> list[Route]:
    """The routes of all documents; the files of the folder ``page`` have their own names, ``index.html`` is ``/``."""
    document = openapi_document(config)
    kinds = PROBLEM_TYPES.values()
    pretty = partial(json.dumps, indent=2, ensure_ascii=False)
    docs = _TEMPLATES.get_template("docs.html.j2").render(root="./", document=document, problems=kinds, pretty=pretty)
    problem = _TEMPLATES.get_template("problem.html.j2")
    package = files("rafce_ray.service")
    routes = [
        _fixed("/openapi.json", to_json(document), "application/json"),
        _fixed("/docs", docs.encode(), "text/html"),
        _fixed("/docs.css", package.joinpath("templates", "docs.css").read_bytes(), "text/css"),
        *(_fixed(kind.uri, problem.render(root="../", kind=kind).encode(), "text/html") for kind in kinds),
    ]
    for file in package.joinpath("page").iterdir():
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            routes.append(_fixed("/" if file.name == "index.html" else f"/{file.name}", file.read_bytes(), media_type))
    return routes


def _fixed(path: str, content: bytes, media_type: str) -> Route:
    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route(path, endpoint)


def openapi_document(config: ServiceConfig) -> Document:
    """The OpenAPI document of a service. Its operations need a key where the service has a keys file."""
    _, definitions = TypeAdapter.json_schemas(
        [(record, "serialization", TypeAdapter(record)) for record in _RECORDS],
        ref_template="#/components/schemas/{model}",
    )
    options = TypeAdapter(Options).json_schema()["properties"]
    parameters = [
        {
            "name": name,
            "in": "query",
            "schema": {key: value for key, value in option.items() if key not in ("title", "description")},
            "description": f"{option['description']} In the query only where the body is one picture.",
        }
        for name, option in options.items()
    ]
    text = _TEMPLATES.get_template("openapi.yaml.j2").render(
        config=config,
        version=__version__,
        perceived=PERCEIVED,
        options=options,
        parameters=parameters,
        unread=plain(_unread("undecodable")),
        problems=_problems,
        predict_problems=_PREDICT_PROBLEMS,
        schemas=definitions["$defs"],
    )
    document: Document = yaml.safe_load(text)
    return document


def _problems(codes: Sequence[str]) -> Document:
    """A response for each status, with an example of each kind of problem that has it."""
    responses: Document = {}
    for status in sorted({PROBLEM_TYPES[code].status for code in codes}):
        kinds = [PROBLEM_TYPES[code] for code in codes if PROBLEM_TYPES[code].status == status]
        schema: Document = {"$ref": "#/components/schemas/ProblemDocument"}
        examples: Document = {kind.code: {"value": _unread(kind.code).error} for kind in kinds}
        if "no_image_read" in examples:
            schema = {"anyOf": [schema, {"$ref": "#/components/schemas/NoImageRead"}]}
            examples["no_image_read"]["value"] |= {"results": [plain(_unread("undecodable"))]}
        told = " ".join(f"`{kind.code}`: {kind.meaning}" for kind in kinds)
        responses[str(status)] = {
            "description": told,
            "content": {MEDIA_TYPE: {"schema": schema, "examples": examples}},
        }
        if status == 429:
            seconds = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
            responses[str(status)]["headers"] = {"Retry-After": seconds}
    return responses


def _unread(code: str) -> Result:
    """An example of a picture that has no answer."""
    problem = Problem(code, PROBLEM_TYPES[code].meaning)
    error = problem_document(problem, "/v1/predict", "5f0c1b7e9a3d4c2f8e6a1b0d9c8e7f65")
    return Result("1", "error", None, None, (), 0, error)
