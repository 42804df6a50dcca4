"""The service's documents: the page at ``/``, ``/docs``, ``/openapi.json`` and a page for each problem.

They are made once, at the start. Nothing in them comes from a request, and no page loads anything from elsewhere.
Addresses are relative: they still work when a proxy puts a prefix before the paths.
"""

from __future__ import annotations

import json
from functools import partial
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray import __version__
from rafce_ray.bundle.model import (
    ActionUnitPrediction,
    BasicEmotionScore,
    ConsistencyRemark,
    EmotionPrediction,
    EmotionScore,
    FacePrediction,
    plain,
)
from rafce_ray.bundle.model_card import PERCEIVED
from rafce_ray.faces.face import Box, Detection
from rafce_ray.service.admin import Promote, Reload, Rollback
from rafce_ray.service.answers import (
    ModelId,
    NoImageRead,
    PredictAnswer,
    ReadyStatus,
    Record,
    Result,
    Status,
    Timings,
    to_json,
)
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.model_info import ModelInfo
from rafce_ray.service.open_inference import InferAnswer, InferError, InferModel, InferRequest
from rafce_ray.service.problems import (
    MEDIA_TYPE,
    PROBLEM_TYPES,
    Problem,
    ProblemDocument,
    ProblemType,
    problem_document,
)
from rafce_ray.service.requests import Options, PredictRequest

Document = dict[str, Any]

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
"""Of a page's files, by the end of their names."""

JSON = "application/json"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
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


def document_routes(config: ServiceConfig) -> list[Route]:
    """The routes of all documents; the files of the folder ``page`` have their own names, ``index.html`` is ``/``."""
    document = openapi_document(config)
    environment = Environment(
        loader=PackageLoader("rafce_ray.service", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    kinds = PROBLEM_TYPES.values()
    pretty = partial(json.dumps, indent=2, ensure_ascii=False)
    docs = environment.get_template("docs.html.j2").render(
        root="./", document=document, problems=kinds, type_of=type_of, pretty=pretty
    )
    problem = environment.get_template("problem.html.j2")
    package = files("rafce_ray.service")
    routes = [
        _fixed("/openapi.json", to_json(document), JSON),
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


def type_of(schema: dict[str, Any]) -> Markup:
    """A JSON schema's type in a few words as HTML, with links to the records that it names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    if "anyOf" in schema:
        return Markup(" or ").join(type_of(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        constants = schema.get("enum", [schema.get("const")])
        texts = (json.dumps(one, ensure_ascii=False) for one in constants)
        return Markup(" | ").join(Markup("<code>{}</code>").format(text) for text in texts)
    kind = str(schema.get("type", "any value"))
    if kind == "array":
        inner = {str(one): one for one in schema.get("prefixItems", [schema.get("items", {})])}
        return Markup("array of ") + Markup(", ").join(type_of(one) for one in inner.values())
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    bounds = f"{low} to {high}" if high is not None else f"from {low}" if low is not None else ""
    form = {"binary": "file", "date-time": "time, ISO 8601"}.get(str(schema.get("format")), kind)
    return escape(" ".join(filter(None, (form, bounds))))


def openapi_document(config: ServiceConfig) -> Document:
    """The OpenAPI document of a service. Its operations need a key where the service has a keys file."""
    _, definitions = TypeAdapter.json_schemas(
        [(record, "serialization", TypeAdapter(record)) for record in _RECORDS],
        ref_template="#/components/schemas/{model}",
    )
    document: Document = {
        "openapi": "3.1.0",
        "info": {
            "title": "rafce_ray",
            "version": __version__,
            "summary": "Perceived emotions and facial action units of the faces in photographs.",
            "description": PERCEIVED,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        # Relative to the document's own address, which a proxy may have put below a prefix.
        "servers": [{"url": "."}],
        "paths": _paths(config),
        "components": {"schemas": definitions["$defs"]},
    }
    if config.keys_file is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _paths(config: ServiceConfig) -> Document:
    keys: Document = {} if config.keys_file is None else {"security": [{"key": []}]}
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "description": "Its name."}
    metadata = _get("metadata", "Open Inference Protocol: inputs and outputs", "InferModel")
    metadata["responses"]["404"] = _content("There is no such model.", _ref("InferError"))
    promotion = "Make a version live that passes its gates, or whose gates are overruled"
    versions = "All versions of the registry, and which is live and why"
    return {
        "/v1/predict": {"post": _predict(config) | keys},
        "/v1/model": {"get": _get("model", "Which model answers, how good it is, and what it is for", "ModelInfo")},
        "/healthz": {"get": _get("health", "Whether the process works", "Status", "not_ready")},
        "/readyz": {"get": _get("ready", "Whether a known picture gets its known answer", "ReadyStatus", "not_ready")},
        "/v2/models/{model}": {"parameters": [model], "get": metadata},
        "/v2/models/{model}/infer": {"parameters": [model], "post": _infer() | keys},
        "/v1/admin/versions": {"get": _admin("versions", versions) | keys},
        "/v1/admin/reload": {"post": _admin("reload", "Look at once whether another version is live", Reload) | keys},
        "/v1/admin/promote": {"post": _admin("promote", promotion, Promote) | keys},
        "/v1/admin/rollback": {"post": _admin("rollback", "Make live again what was before", Rollback) | keys},
    }


def _predict(config: ServiceConfig) -> Document:
    picture = {"type": "string", "format": "binary"}
    options = TypeAdapter(Options).json_schema()["properties"]
    parts = {"files": {"type": "array", "items": picture, "description": "A part for each picture."}, **options}
    form = {"type": "object", "properties": parts, "required": ["files"], "additionalProperties": False}
    answer = _content("A result for each picture, in order.", _ref("PredictAnswer"))
    answer["content"][JSON]["example"] = ANSWER_EXAMPLE
    return {
        "operationId": "predict",
        "summary": "Emotions and action units of every face in one or several pictures",
        "description": "One picture as the body, options in the query; or several as JSON or as a form, each with a "
        "result of its own: a picture that cannot be read does not fail its neighbours. At most "
        f"{config.limits.max_images} pictures and {config.limits.max_body_bytes:,} bytes a request.",
        "parameters": [
            {
                "name": name,
                "in": "query",
                "schema": {key: value for key, value in option.items() if key not in ("title", "description")},
                "description": f"{option['description']} In the query only where the body is one picture.",
            }
            for name, option in options.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                **{media: {"schema": picture} for media in IMAGE_TYPES},
                JSON: {"schema": _ref("PredictRequest"), "example": REQUEST_EXAMPLE},
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {"200": answer, **_problems(_PREDICT_PROBLEMS)},
    }


def _infer() -> Document:
    return {
        "operationId": "infer",
        "summary": "Open Inference Protocol: probabilities of aligned faces",
        "description": "One input: `images` (FP32 or UINT8, shape (B, S, S, 3), RGB, whole numbers of 0 to 255, S as "
        "in the model's metadata) or `image_bytes` (BYTES, shape (B), base64 of image files that are an aligned face "
        "each).",
        "requestBody": {"required": True, "content": {JSON: {"schema": _ref("InferRequest")}}},
        "responses": {
            "200": _content("Probabilities.", _ref("InferAnswer")),
            "default": _content("What went wrong, with the statuses of /v1/predict.", _ref("InferError")),
        },
    }


def _admin(name: str, summary: str, body: type[Record] | None = None) -> Document:
    content = {} if body is None else {"requestBody": {"content": {JSON: {"schema": _ref(body.__name__)}}}}
    responses = {
        "200": _content(f"{summary}.", {"type": "object"}),
        "default": _content("Why nothing was changed.", {"type": "object"}, MEDIA_TYPE),
    }
    description = "For keys with the scope admin; without a keys file nobody has it."
    return {"operationId": name, "summary": summary, "description": description, "responses": responses, **content}


def _get(name: str, summary: str, answer: str, *codes: str) -> Document:
    responses = {"200": _content(f"{summary}.", _ref(answer)), **_problems(codes)}
    return {"operationId": name, "summary": summary, "responses": responses}


def _content(description: str, schema: Document, media_type: str = JSON) -> Document:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _ref(record: str) -> Document:
    return {"$ref": f"#/components/schemas/{record}"}


def _problems(codes: tuple[str, ...]) -> Document:
    """A response for each status, with an example of each kind of problem that has it."""
    responses: Document = {}
    for status in sorted({PROBLEM_TYPES[code].status for code in codes}):
        kinds = [PROBLEM_TYPES[code] for code in codes if PROBLEM_TYPES[code].status == status]
        schema = _ref("ProblemDocument")
        if any(kind.code == "no_image_read" for kind in kinds):
            schema = {"anyOf": [schema, _ref("NoImageRead")]}
        response = _content(" ".join(f"`{kind.code}`: {kind.meaning}" for kind in kinds), schema, MEDIA_TYPE)
        response["content"][MEDIA_TYPE]["examples"] = {kind.code: {"value": problem_example(kind)} for kind in kinds}
        if status == 429:
            seconds = {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
            response["headers"] = {"Retry-After": seconds}
        responses[str(status)] = response
    return responses


def problem_example(kind: ProblemType) -> Document:
    """A problem document of this kind."""
    document: Document = {**problem_document(Problem(kind.code, kind.meaning), "/v1/predict", _REQUEST_ID)}
    return document | {"results": [ANSWER_EXAMPLE["results"][1]]} if kind.code == "no_image_read" else document


_REQUEST_ID = "5f0c1b7e9a3d4c2f8e6a1b0d9c8e7f65"

REQUEST_EXAMPLE: Document = {
    "images": [{"id": "left", "data": "/9j/4AAQSkZJRg..."}, {"data": "data:image/png;base64,iVBORw0KGgo..."}],
    "options": {"faces": "detect", "top_k": 2, "return_distribution": False},
}

_SURPRISED = EmotionScore("happily surprised", 0, 0.71)
_BASIC = (BasicEmotionScore("surprised", 0.75), BasicEmotionScore("happy", 0.9))
_FACE = FacePrediction(
    Box(142, 200, 318, 318),
    "eyes",
    Detection("yunet", 0.94),
    EmotionPrediction(
        **vars(_SURPRISED), unsure=False, top=(_SURPRISED, EmotionScore("happily sad", 13, 0.12)), basic=_BASIC
    ),
    (ActionUnitPrediction("AU12", "Lip corner puller", 0.93, 0.4, True),),
    ConsistencyRemark(0.97, ()),
)
_DAMAGED = Problem("undecodable", PROBLEM_TYPES["undecodable"].meaning)
ANSWER_EXAMPLE: Document = plain(
    PredictAnswer(
        ModelId("rafce", "3", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"),
        _REQUEST_ID,
        (
            Result("left", "ok", 600, 800, (_FACE,), 0, None),
            Result("1", "error", None, None, (), 0, problem_document(_DAMAGED, "/v1/predict", _REQUEST_ID)),
        ),
        Timings(decode_ms=46.1, queue_ms=0.2, inference_ms=4.9, total_ms=52.3),
    )
)
