"""What people and programs read of the service: ``/docs``, ``/openapi.json``, the page of each problem, and the page at ``/``.

All of it is made once, at the start; nothing in it comes from a request, and no page loads anything from elsewhere.
Addresses are relative, so that they work below a prefix that a proxy puts before the service.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rafce_ray.service.answers import to_json
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.openapi import openapi_document
from rafce_ray.service.problems import PROBLEM_TYPES

MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
    ".ico": "image/x-icon",
}


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
