"""``/openapi.json``: every path, every form of request, every kind of answer and problem, as an OpenAPI 3.1 document."""

from __future__ import annotations

from pydantic.json_schema import models_json_schema

from rafce_ray import __version__
from rafce_ray.model_card import PERCEIVED
from rafce_ray.service import schema
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.model_info import ModelInfo
from rafce_ray.service.openapi_examples import ANSWER_EXAMPLE, REQUEST_EXAMPLE, Document, problem_example
from rafce_ray.service.problems import MEDIA_TYPE, PROBLEM_TYPES, ProblemType
from rafce_ray.service.tensors import InferAnswer, InferError, InferModel, InferRequest

JSON = "application/json"
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")
_REF = "#/components/schemas/"
_RECORDS = (
    schema.PredictAnswer,
    schema.PredictRequest,
    schema.ProblemDocument,
    schema.NoImageRead,
    ModelInfo,
    schema.Status,
    schema.ReadyStatus,
    InferRequest,
    InferAnswer,
    InferModel,
    InferError,
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


def openapi_document(config: ServiceConfig) -> Document:
    """The document of a service; a key is asked for where it has a keys file."""
    _, definitions = models_json_schema(
        [(record, "serialization") for record in _RECORDS], ref_template=_REF + "{model}"
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
        "/v1/admin/reload": {"post": _admin(config, "reload", "Look at once whether another version is live")},
        "/v1/admin/promote": {
            "post": _admin(
                config,
                "promote",
                "Make a version live that passes its gates, or whose gates are overruled",
                version={"type": "string", "description": "Name of a version of the registry."},
                force={"type": "boolean", "description": "Overrule gates that may be overruled; needs why."},
                why={"type": "string", "description": "The reason, one line; it stays in the history."},
            )
        },
        "/v1/admin/rollback": {
            "post": _admin(
                config,
                "rollback",
                "Make live again what was before",
                why={"type": "string", "description": "The reason, one line; it stays in the history."},
            )
        },
    }


def _predict(config: ServiceConfig) -> Document:
    pictures = {media: {"schema": {"type": "string", "format": "binary"}} for media in IMAGE_TYPES}
    options = schema.Options.model_json_schema()["properties"]
    return {
        "operationId": "predict",
        "summary": "Emotions and action units of every face in one or several pictures",
        "description": "One picture as the body, options in the query; or several as JSON or as a form, each with a result of its own: a "
        f"picture that cannot be read does not fail its neighbours. At most {config.limits.max_images} pictures and "
        f"{config.limits.max_body_bytes:,} bytes a request.",
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
        "description": "One input: `images` (FP32 or UINT8, shape (B, S, S, 3), RGB, whole numbers of 0 to 255, S as in the model's "
        "metadata) or `image_bytes` (BYTES, shape (B), base64 of image files that are an aligned face each).",
        **_security(config),
        "requestBody": {"required": True, "content": {JSON: {"schema": {"$ref": _REF + "InferRequest"}}}},
        "responses": {
            "200": _answer("Probabilities.", "InferAnswer"),
            "default": _answer("What went wrong, with the statuses of /v1/predict.", "InferError"),
        },
    }


def _admin(config: ServiceConfig, name: str, summary: str, **fields: Document) -> Document:
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
    if fields:
        body = {"type": "object", "properties": fields, "additionalProperties": False}
        if "version" in fields:
            body["required"] = ["version"]
        operation["requestBody"] = {"content": {JSON: {"schema": body}}}
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
