"""What people and programs read of the service: ``/docs``, ``/openapi.json``, the page of each problem, and the page at
``/``.

All of it is made once, at the start; nothing in it comes from a request, and no page loads anything from elsewhere.
Addresses are relative, so that they work below a prefix that a proxy puts before the service.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray import __version__
from rafce_ray.bundle.model_card import PERCEIVED
from rafce_ray.service.admin import Promote, Reload, Rollback
from rafce_ray.service.answers import NoImageRead, PredictAnswer, ReadyStatus, Record, Status, to_json
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.model_info import ModelInfo
from rafce_ray.service.open_inference import InferAnswer, InferError, InferModel, InferRequest
from rafce_ray.service.problems import MEDIA_TYPE, PROBLEM_TYPES, ProblemDocument, ProblemType
from rafce_ray.service.requests import Options, PredictRequest

Document = dict[str, Any]

MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
}

JSON = "application/json"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
_REF = "#/components/schemas/"
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

_NOT_OF_PREDICT = frozenset(
    (
        "not_found",
        "method_not_allowed",
        "unknown_method",
        "not_ready",
        "scope_missing",
        "client_gone",
        "change_refused",
        "no_such_version",
    )
)
_PREDICT_PROBLEMS = tuple(code for code in PROBLEM_TYPES if code not in _NOT_OF_PREDICT)


def document_routes(config: ServiceConfig) -> list[Route]:
    """The routes of all documents."""
    document = openapi_document(config)
    environment = Environment(
        loader=PackageLoader("rafce_ray.service", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    docs = environment.get_template("docs.html.j2").render(
        root="./", document=document, problems=PROBLEM_TYPES.values(), type_of=type_of, pretty=_pretty
    )
    style = files("rafce_ray.service").joinpath("templates", "docs.css").read_text("utf-8")
    problem = environment.get_template("problem.html.j2")
    return [
        _fixed("/openapi.json", to_json(document), "application/json"),
        _fixed("/docs", docs.encode(), "text/html"),
        _fixed("/docs.css", style.encode(), "text/css"),
        *(
            _fixed(kind.uri, problem.render(root="../", kind=kind).encode(), "text/html")
            for kind in PROBLEM_TYPES.values()
        ),
        *_page_routes(),
    ]


def _page_routes() -> list[Route]:
    """Every file of the folder ``page`` under its own name, ``index.html`` at ``/``."""
    routes = []
    for file in files("rafce_ray.service").joinpath("page").iterdir():
        media_type = MEDIA_TYPES.get(f".{file.name.rpartition('.')[2]}")
        if media_type is not None:
            path = "/" if file.name == "index.html" else f"/{file.name}"
            routes.append(_fixed(path, file.read_bytes(), media_type))
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
        return Markup(" | ").join(Markup("<code>{}</code>").format(_compact(one)) for one in _constants(schema))
    kind = str(schema.get("type", "any value"))
    if kind == "array":
        inner = {str(one): one for one in schema.get("prefixItems", [schema.get("items", {})])}
        return Markup("array of ") + Markup(", ").join(type_of(one) for one in inner.values())
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    bounds = f"{low} to {high}" if high is not None else f"from {low}" if low is not None else ""
    form = {"binary": "file", "date-time": "time, ISO 8601"}.get(str(schema.get("format")), kind)
    return escape(" ".join(filter(None, (form, bounds))))


def _constants(schema: dict[str, Any]) -> list[Any]:
    return list(schema["enum"]) if "enum" in schema else [schema["const"]]


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def openapi_document(config: ServiceConfig) -> Document:
    """The document of a service; a key is asked for where it has a keys file."""
    _, definitions = TypeAdapter.json_schemas(
        [(record, "serialization", TypeAdapter(record)) for record in _RECORDS], ref_template=_REF + "{model}"
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
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}, "description": "Its name."}
    return {
        "/v1/predict": {"post": _predict(config)},
        "/v1/model": {"get": _get("model", "Which model answers, how good it is, and what it is for", "ModelInfo")},
        "/healthz": {"get": _get("health", "Whether the process works", "Status", "not_ready")},
        "/readyz": {"get": _get("ready", "Whether a known picture gets its known answer", "ReadyStatus", "not_ready")},
        "/v2/models/{model}": {
            "parameters": [model],
            "get": _get("metadata", "Open Inference Protocol: inputs and outputs", "InferModel", error="InferError"),
        },
        "/v2/models/{model}/infer": {"parameters": [model], "post": _infer(config)},
        "/v1/admin/versions": {
            "get": _admin(config, "versions", "All versions of the registry, and which is live and why")
        },
        "/v1/admin/reload": {"post": _admin(config, "reload", "Look at once whether another version is live", Reload)},
        "/v1/admin/promote": {
            "post": _admin(
                config,
                "promote",
                "Make a version live that passes its gates, or whose gates are overruled",
                Promote,
            )
        },
        "/v1/admin/rollback": {"post": _admin(config, "rollback", "Make live again what was before", Rollback)},
    }


def _predict(config: ServiceConfig) -> Document:
    pictures = {media: {"schema": {"type": "string", "format": "binary"}} for media in IMAGE_TYPES}
    options = TypeAdapter(Options).json_schema()["properties"]
    return {
        "operationId": "predict",
        "summary": "Emotions and action units of every face in one or several pictures",
        "description": "One picture as the body, options in the query; or several as JSON or as a form, each with a "
        "result of its own: a picture that cannot be read does not fail its neighbours. At most "
        f"{config.limits.max_images} pictures and {config.limits.max_body_bytes:,} bytes a request.",
        **_security(config),
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
                **pictures,
                JSON: {"schema": {"$ref": _REF + "PredictRequest"}, "example": REQUEST_EXAMPLE},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "files": {
                                "type": "array",
                                "items": {"type": "string", "format": "binary"},
                                "description": "A part for each picture.",
                            },
                            **options,
                        },
                        "required": ["files"],
                        "additionalProperties": False,
                    }
                },
            },
        },
        "responses": {
            "200": {
                "description": "A result for each picture, in order.",
                "content": {JSON: {"schema": {"$ref": _REF + "PredictAnswer"}, "example": ANSWER_EXAMPLE}},
            },
            **_problems(_PREDICT_PROBLEMS),
        },
    }


def _infer(config: ServiceConfig) -> Document:
    return {
        "operationId": "infer",
        "summary": "Open Inference Protocol: probabilities of aligned faces",
        "description": "One input: `images` (FP32 or UINT8, shape (B, S, S, 3), RGB, whole numbers of 0 to 255, S as "
        "in the model's metadata) or `image_bytes` (BYTES, shape (B), base64 of image files that are an aligned face "
        "each).",
        **_security(config),
        "requestBody": {"required": True, "content": {JSON: {"schema": {"$ref": _REF + "InferRequest"}}}},
        "responses": {
            "200": _answer("Probabilities.", "InferAnswer"),
            "default": _answer("What went wrong, with the statuses of /v1/predict.", "InferError"),
        },
    }


def _admin(config: ServiceConfig, name: str, summary: str, body: type[Record] | None = None) -> Document:
    operation: Document = {
        "operationId": name,
        "summary": summary,
        "description": "For keys with the scope admin; without a keys file nobody has it.",
        **_security(config),
        "responses": {
            "200": {"description": f"{summary}.", "content": {JSON: {"schema": {"type": "object"}}}},
            "default": {
                "description": "Why nothing was changed.",
                "content": {MEDIA_TYPE: {"schema": {"type": "object"}}},
            },
        },
    }
    if body is not None:
        operation["requestBody"] = {"content": {JSON: {"schema": {"$ref": _REF + body.__name__}}}}
    return operation


def _get(name: str, summary: str, answer: str, *codes: str, error: str | None = None) -> Document:
    responses = {"200": _answer(f"{summary}.", answer), **_problems(codes)}
    if error is not None:
        responses["404"] = _answer("There is no such model.", error)
    return {"operationId": name, "summary": summary, "responses": responses}


def _answer(description: str, record: str) -> Document:
    return {"description": description, "content": {JSON: {"schema": {"$ref": _REF + record}}}}


def _security(config: ServiceConfig) -> Document:
    return {} if config.keys_file is None else {"security": [{"key": []}]}


def _problems(codes: tuple[str, ...]) -> Document:
    """A response for each status, with an example of each kind of problem that has it."""
    by_status: dict[int, list[ProblemType]] = {}
    for code in codes:
        by_status.setdefault(PROBLEM_TYPES[code].status, []).append(PROBLEM_TYPES[code])
    return {str(status): _problem_response(types) for status, types in sorted(by_status.items())}


def _problem_schema(types: list[ProblemType]) -> Document:
    plain = {"$ref": _REF + "ProblemDocument"}
    several = any(one.code == "no_image_read" for one in types)
    return {"anyOf": [plain, {"$ref": _REF + "NoImageRead"}]} if several else plain


def _problem_response(types: list[ProblemType]) -> Document:
    response: Document = {
        "description": " ".join(f"`{one.code}`: {one.meaning}" for one in types),
        "content": {
            MEDIA_TYPE: {
                "schema": _problem_schema(types),
                "examples": {one.code: {"value": problem_example(one)} for one in types},
            }
        },
    }
    if types[0].status == 429:
        response["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}}
    return response


def problem_example(kind: ProblemType) -> Document:
    """A problem document of this kind."""
    document = {
        "type": kind.uri,
        "title": kind.title,
        "status": kind.status,
        "detail": kind.meaning,
        "hint": kind.hint,
        "instance": "/v1/predict",
        "request_id": "5f0c1b7e9a3d4c2f8e6a1b0d9c8e7f65",
    }
    return document | {"results": [ANSWER_EXAMPLE["results"][1]]} if kind.code == "no_image_read" else document


REQUEST_EXAMPLE: Document = {
    "images": [{"id": "left", "data": "/9j/4AAQSkZJRg..."}, {"data": "data:image/png;base64,iVBORw0KGgo..."}],
    "options": {"faces": "detect", "top_k": 2, "return_distribution": False},
}

ANSWER_EXAMPLE: Document = {
    "model": {
        "name": "rafce",
        "version": "3",
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    },
    "request_id": "5f0c1b7e9a3d4c2f8e6a1b0d9c8e7f65",
    "results": [
        {
            "id": "left",
            "status": "ok",
            "width": 600,
            "height": 800,
            "faces": [
                {
                    "box": {"x": 142, "y": 200, "width": 318, "height": 318},
                    "alignment": "eyes",
                    "emotion": {
                        "label": "happily surprised",
                        "index": 0,
                        "probability": 0.71,
                        "unsure": False,
                        "top": [
                            {"label": "happily surprised", "index": 0, "probability": 0.71},
                            {"label": "happily sad", "index": 13, "probability": 0.12},
                        ],
                        "basic": [{"label": "surprised", "probability": 0.75}, {"label": "happy", "probability": 0.9}],
                    },
                    "action_units": [
                        {
                            "code": "AU12",
                            "name": "Lip corner puller",
                            "probability": 0.93,
                            "threshold": 0.4,
                            "active": True,
                        }
                    ],
                    "consistency": {"score": 0.97, "contradicting": []},
                }
            ],
            "faces_left_out": 0,
            "error": None,
        },
        {
            "id": "1",
            "status": "error",
            "width": None,
            "height": None,
            "faces": [],
            "faces_left_out": 0,
            "error": problem_example(PROBLEM_TYPES["undecodable"]),
        },
    ],
    "timings": {"decode_ms": 46.1, "queue_ms": 0.2, "inference_ms": 4.9, "total_ms": 52.3},
}
