"""The corpus of bad requests to ``/v1/predict``: generated, deterministic, as many as are asked for.

``bad_inputs(number, seed)`` yields every hand-made case first and then seeded mutations of good ones, without end.
``fault(input, status, answer)`` says what an answer does that is not documented, or None.
"""

import base64
import gzip
import io
import itertools
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

BOUNDARY = "corpus0boundary"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
IMAGE_CODES = frozenset(
    ("empty", "too_many_bytes", "unsupported_format", "bad_header", "too_small", "too_large", "too_many_scans")
) | {"undecodable", "no_face", "bad_base64"}
IMAGE_STATUSES = frozenset((413, 415, 422))


@dataclass(frozen=True)
class BadInput:
    """A request body to ``POST /v1/predict`` and what may answer it.

    ``statuses``: of the response; ``codes``: of its problem, or with status 200 of the results that are errors.
    ``may_succeed``: damage that a decoder may not notice (a flipped bit of a pixel), so a good answer is right as well.
    """

    name: str
    content_type: str | None
    body: bytes = field(repr=False)
    statuses: frozenset[int]
    codes: frozenset[str]
    may_succeed: bool = False
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def all_headers(self) -> dict[str, str]:
        """The headers to send."""
        content_type = {} if self.content_type is None else {"content-type": self.content_type}
        return {**content_type, **dict(self.headers)}


def fault(bad: BadInput, status: int, answer: bytes) -> str | None:
    """What is not documented about a response to a bad input; None where it is as it should be."""
    if status not in bad.statuses and not (status == 200 and bad.may_succeed):
        return f"{bad.name}: status {status}, expected {sorted(bad.statuses)}: {answer[:300]!r}"
    content = json.loads(answer)
    if status != 200:
        if content["type"].removeprefix("/problems/") not in bad.codes:
            return f"{bad.name}: {content['type']}, expected {sorted(bad.codes)}"
        missing = [key for key in ("title", "detail", "hint", "instance", "request_id") if not content.get(key)]
        return f"{bad.name}: the problem has no {missing}" if missing else None
    for result in content["results"]:
        code = None if result["error"] is None else result["error"]["type"].removeprefix("/problems/")
        if code not in bad.codes and not (code is None and bad.may_succeed):
            return f"{bad.name}: result {result['id']} is {code or 'ok'}, expected {sorted(bad.codes)}"
    return None


def bad_inputs(number: int | None = None, *, seed: int = 0) -> Iterator[BadInput]:
    """The first ``number`` cases, or without it the hand-made ones alone."""
    if number is None:
        yield from _hand_made()
        return
    yield from itertools.islice(itertools.chain(_hand_made(), mutations(seed)), number)


def face_like(px: int = 64, seed: int = 0) -> Image.Image:
    """A smooth picture that compresses like a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((px, px), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """The picture as a file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def multipart(*parts: tuple[str, bytes], boundary: str = BOUNDARY) -> bytes:
    """A form with (name, content) parts."""
    text = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; '
        f'filename="x"\r\n\r\n{content.decode("latin-1")}\r\n'
        for name, content in parts
    )
    return f"{text}--{boundary}--\r\n".encode("latin-1")


def json_body(*images: bytes) -> bytes:
    """A JSON request with these image files."""
    return json.dumps({"images": [{"data": base64.b64encode(image).decode()} for image in images]}).encode()


def png(width: int, height: int, *, data: bytes = b"", bit_depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header says what it likes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 1)) + chunk(b"IEND", b"")


def _hand_made() -> Iterator[BadInput]:
    yield from _bad_images()
    yield from _bad_json()
    yield from _bad_forms()
    yield from _bad_requests()


def _image(name: str, body: bytes, *codes: str, may_succeed: bool = False, kind: str = "image/jpeg") -> BadInput:
    return BadInput(name, kind, body, IMAGE_STATUSES, frozenset(codes) or IMAGE_CODES, may_succeed)


def _bad_images() -> Iterator[BadInput]:
    yield _image("empty", b"", "empty")
    for size in (1, 16, 4096):
        yield _image(f"random {size}", random.Random(size).randbytes(size), "unsupported_format")
    for name, content in _good_files().items():
        for tenth in range(1, 10):
            # A file without its last bytes may still hold every pixel.
            cut = content[: len(content) * tenth // 10]
            yield _image(f"{name} cut at {tenth}/10", cut, may_succeed=tenth == 9)
        # Zeros where a WebP has its pixels are pixels as well.
        yield _image(f"{name} head and zeros", content[:40] + bytes(4096), may_succeed=name == "WebP")
        yield _image(f"gzip of {name}", gzip.compress(content, mtime=0), "unsupported_format")
        yield _image(f"{name} behind HTML", b"<html><script>alert(1)</script>" + content, "unsupported_format")
        yield _image(f"{name} before HTML", content + b"<script>alert(1)</script>", may_succeed=True)
    yield _image(
        "bomb: one bit, 8192 x 8192", png(8192, 8192, data=bytes(8192 * 1025), bit_depth=1, colour=0), "too_large"
    )
    yield _image("bomb: 25 megapixels of zeros", png(5000, 5000, data=bytes(15_005_000)), "undecodable", "no_face")
    yield _image("bomb: zlib without end", png(64, 64, data=bytes(2**25)), may_succeed=True)
    for width, height in ((65535, 65535), (2**31 - 1, 1), (1, 2**31 - 1), (65535, 16)):
        yield _image(f"header of {width} x {height}", png(width, height), "too_large", "too_small", "bad_header")
    for width, height in ((0, 0), (0, 64), (64, 0)):
        yield _image(f"header of {width} x {height}", png(width, height), "too_small", "bad_header")
    jpeg = encoded(face_like(), "JPEG")
    start = jpeg.index(b"\xff\xc0") + 5
    for height, width in ((65535, 65535), (0, 64), (64, 0)):
        changed = jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]
        yield _image(
            f"JPEG header of {width} x {height}", changed, "too_large", "too_small", "bad_header", "undecodable"
        )
    for format in ("JPEG", "PNG", "WEBP"):
        yield _image(f"one pixel {format}", encoded(face_like(1), format), "too_small")
    scan = encoded(face_like(), "JPEG", progressive=True)
    middle = scan.index(b"\xff\xda")
    yield _image(
        "5,000 scans",
        scan[:middle] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 5000 + scan[middle:],
        "too_many_scans",
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield _image("SVG", svg, "unsupported_format")
    for format in ("GIF", "BMP", "TIFF", "PPM", "ICO"):
        yield _image(format, encoded(face_like(), format), "unsupported_format")
    frames = [face_like(64, seed) for seed in range(4)]
    for format in ("GIF", "PNG", "WEBP"):
        animated = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        # Of an animation the first frame is read.
        yield _image(
            f"animated {format}",
            animated,
            *(["unsupported_format"] if format == "GIF" else ["no_face"]),
            may_succeed=format != "GIF",
        )
    yield _image("ZIP", b"PK\x03\x04" + bytes(200), "unsupported_format")
    yield _image("polyglot JPEG and ZIP", jpeg + b"PK\x05\x06" + bytes(18), may_succeed=True)


def _bad_json() -> Iterator[BadInput]:
    good = base64.b64encode(encoded(face_like(), "JPEG")).decode()

    def case(name: str, body: str | bytes, *codes: str, status: int = 400) -> BadInput:
        content = body if isinstance(body, bytes) else body.encode()
        return BadInput(f"JSON: {name}", "application/json", content, frozenset((status,)), frozenset(codes))

    for name, text in {
        "empty": "",
        "space": "   ",
        "cut short": '{"images": [{"data": "' + good[:100],
        "two values": '{"images": []} {}',
        "single quotes": "{'images': []}",
        "trailing comma": '{"images": [],}',
        "comment": '{"images": [] /* none */}',
        "control character": '{"images": "\n"}',
        "lone quote": '"',
        "NaN": '{"images": NaN}',
        "Infinity": '{"images": [{"data": -Infinity}]}',
    }.items():
        yield case(name, text, "malformed_json")
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        yield case(encoding, '{"images": []}'.encode(encoding), "malformed_json")
    yield case("bytes that are no UTF-8", b'{"images": "\xff\xfe"}', "malformed_json")
    for depth in (20, 2000, 200_000):
        for opening in ("[", '{"a":', '{"images":[{"data":['):
            yield case(f"{depth} deep {opening}", opening * depth, "malformed_json", "json_too_complex")
    yield case("deep and closed", "[" * 1000 + "]" * 1000, "json_too_complex", "wrong_type")
    yield case("a million numbers", '{"images": [' + "0," * 1_000_000 + "0]}", "json_too_complex")
    yield case("a million objects", '{"images": [' + "{}," * 1_000_000 + "{}]}", "json_too_complex")
    yield case("a million keys", "{" + ",".join(f'"{number}":0' for number in range(300_000)) + "}", "json_too_complex")
    yield case("a million digits", '{"images": ' + "9" * 1_000_000 + "}", "json_too_complex")
    yield case("a long exponent", '{"images": 1e' + "9" * 1_000_000 + "}", "json_too_complex")
    yield case("key twice", '{"images": [], "images": []}', "duplicate_key")
    yield case("data twice", '{"images": [{"data": "", "data": ""}]}', "duplicate_key")
    for name, value in {"null": None, "number": 1, "text": "x", "list": [], "true": True}.items():
        if name != "list":
            yield case(f"images is {name}", json.dumps({"images": value}), "wrong_type")
        yield case(f"the body is {name}", json.dumps(value), "wrong_type")
        yield case(f"an image is {name}", json.dumps({"images": [value]}), "wrong_type")
        if name != "text":
            yield case(f"data is {name}", json.dumps({"images": [{"data": value}]}), "wrong_type")
            yield case(f"id is {name}", json.dumps({"images": [{"data": good, "id": value}]}), "wrong_type")
        yield case(
            f"faces is {name}", json.dumps({"images": [{"data": good}], "options": {"faces": value}}), "bad_option"
        )
    yield case("no images", "{}", "missing_key")
    yield case("images empty", '{"images": []}', "missing_key")
    yield case("no data", '{"images": [{"id": "a"}]}', "missing_key")
    yield case("unknown key", '{"images": [{"data": "", "url": "http://169.254.169.254/"}]}', "unknown_key")
    yield case("unknown option", json.dumps({"images": [{"data": good}], "options": {"topk": 2}}), "unknown_option")
    for top_k in (0, -1, 10**9, 1.5, True, "3"):
        yield case(
            f"top_k {top_k!r}", json.dumps({"images": [{"data": good}], "options": {"top_k": top_k}}), "bad_option"
        )
    for id_ in ("", "x" * 129, "a\nb", "\ud800", "\x00"):
        yield case(f"id {id_[:9]!a}", json.dumps({"images": [{"data": good, "id": id_}]}), "bad_id")
    yield case("id twice", json.dumps({"images": [{"data": good, "id": "a"}] * 2}), "duplicate_id")
    yield case("lone surrogate as key", '{"\\ud800": 1}', "unknown_key")
    yield case("5,000 images", json.dumps({"images": [{"data": ""}] * 5000}), "json_too_complex", "too_many_images")
    yield case("1,025 images", json.dumps({"images": [{"data": ""}] * 1025}), "too_many_images", status=413)
    for name, data in {
        "one character too many": good.rstrip("=")[:-3] + "A" * (1 + len(good) % 4),
        "padding inside": good[:8] + "====" + good[8:],
        "padding only": "====",
        "two alphabets": "-_+/" + good,
        "not ASCII": "äöüß",
        "a URL": "http://127.0.0.1:22/x",
        "data URI without base64": "data:image/png," + good,
        "data URI without comma": "data:image/png;base64;" + good,
    }.items():
        yield case(f"base64 with {name}", json.dumps({"images": [{"data": data}]}), "bad_base64")
    yield case("data empty", '{"images": [{"data": ""}]}', "empty", status=422)
    yield case("base64 of text", '{"images": [{"data": "aGVsbG8="}]}', "unsupported_format", status=415)


def _bad_forms() -> Iterator[BadInput]:
    jpeg = encoded(face_like(), "JPEG")
    good = multipart(("files", jpeg))

    def case(name: str, body: bytes, *codes: str, status: int = 400, kind: str = MULTIPART) -> BadInput:
        return BadInput(f"form: {name}", kind, body, frozenset((status,)), frozenset(codes))

    yield case("empty", b"", "malformed_multipart")
    yield case("cut short", good[:-20], "malformed_multipart")
    yield case("random", random.Random(1).randbytes(4096), "malformed_multipart")
    yield case("no boundary", good, "malformed_multipart", kind="multipart/form-data")
    yield case("boundary of 71", good, "malformed_multipart", kind="multipart/form-data; boundary=" + "b" * 71)
    yield case("another boundary", good, "malformed_multipart", kind="multipart/form-data; boundary=other")
    yield case("preamble without a new line", b"hello" + good, "missing_key")
    for evil in (b"\r\n--" + BOUNDARY.encode()[:-1], b"\r\n--", b"\r", b"\r\n--" + BOUNDARY.encode() + b"x"):
        yield case(f"2 MiB of {evil!r}", good[:60] + evil * (2**21 // len(evil)), "malformed_multipart", status=400)
    yield case("no parts", f"--{BOUNDARY}--\r\n".encode(), "missing_key")
    yield case("headers without end", f"--{BOUNDARY}\r\nA: ".encode() + b"x" * 100_000, "malformed_multipart")
    nameless = f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode()
    yield case("no name", nameless, "malformed_multipart")
    yield case("no headers", nameless.replace(b"Content-Disposition: form-data\r\n", b""), "malformed_multipart")
    yield case("unknown part", multipart(("file", jpeg)), "unknown_key")
    yield case("part by a path", multipart(("../../etc/passwd", jpeg)), "unknown_key")
    yield case("option without image", multipart(("top_k", b"1")), "missing_key")
    yield case("option twice", multipart(("files", jpeg), ("top_k", b"1"), ("top_k", b"1")), "bad_option")
    for text in (b"", b"x", b"0", b"\xff", b"1" * 5000, "\u0663".encode()):
        yield case(f"top_k {text[:9]!r}", multipart(("files", jpeg), ("top_k", text)), "bad_option")
    yield case("1,030 parts", multipart(*[("files", b"")] * 1030), "too_many_images", status=413)
    yield case("100,000 parts", multipart(*[("files", b"")] * 100_000), "too_many_images", status=413)
    yield case("an empty file", multipart(("files", b"")), "empty", status=422)
    yield case("two bad files", multipart(("files", b"GIF89a"), ("files", jpeg[:200])), "no_image_read", status=422)


def _bad_requests() -> Iterator[BadInput]:
    jpeg = encoded(face_like(), "JPEG")

    def case(name: str, kind: str | None, status: int, code: str, query: str = "", **headers: str) -> BadInput:
        fields = tuple((key.replace("_", "-"), value) for key, value in headers.items())
        return BadInput(name, kind, jpeg, frozenset((status,)), frozenset((code,)), query=query, headers=fields)

    for kind in (
        None,
        "image/gif",
        "image/svg+xml",
        "text/html",
        "application/x-www-form-urlencoded",
        "x" * 200,
        "image/*",
        ";;",
    ):
        yield case(f"Content-Type {str(kind)[:20]}", kind, 415, "unsupported_media_type")
    yield case("charset", "application/json; charset=utf-16", 415, "unsupported_media_type")
    for coding in ("gzip", "br", "deflate", "gzip, gzip", "x"):
        yield case(f"Content-Encoding {coding}", "image/jpeg", 415, "unsupported_encoding", content_encoding=coding)
    yield case("long header", "image/jpeg", 431, "headers_too_large", x_long="x" * 20_000)
    yield case("long query", "image/jpeg", 414, "uri_too_long", query="top_k=" + "1" * 20_000)
    for query in ("top_k=0", "top_k=x", "top_k=", "top_k=1&top_k=1", "faces=all", "return_distribution=1", "top_k=1e3"):
        yield case(f"query {query}", "image/jpeg", 400, "bad_option", query)
    for query in ("url=http://127.0.0.1", "FACES=detect", "path=/etc/passwd"):
        yield case(f"query {query}", "image/jpeg", 400, "unknown_option", query)
    for query in ("top_k", "&", "top_k=%ff", "=" * 5, "&".join(f"a{number}=1" for number in range(99))):
        code = "unknown_option" if query == "=" * 5 else "bad_request"
        yield case(f"query {query[:20]}", "image/jpeg", 400, code, query)
    yield BadInput(
        "query beside JSON",
        "application/json",
        json_body(jpeg),
        frozenset((400,)),
        frozenset(("unknown_option",)),
        query="top_k=1",
    )


def _good_files() -> dict[str, bytes]:
    face = face_like()
    return {
        "JPEG": encoded(face, "JPEG", quality=90),
        "progressive JPEG": encoded(face, "JPEG", progressive=True),
        "PNG": encoded(face, "PNG"),
        "WebP": encoded(face, "WEBP", quality=80),
        "lossless WebP": encoded(face, "WEBP", lossless=True),
    }


def mutations(seed: int) -> Iterator[BadInput]:
    """Good files with seeded damage, as raw bodies, JSON and forms in turn."""
    files = list(_good_files().items())
    for number in itertools.count():
        chance = random.Random(f"{seed} {number}")
        name, content = chance.choice(files)
        damage = chance.choice(_DAMAGES)
        image = damage(chance, content)
        label = f"{name} with {damage.__name__.strip('_')} ({seed}/{number})"
        carrier = number % 4
        if carrier < 2:
            yield _image(label, image, may_succeed=True)
        elif carrier == 2:
            yield BadInput(f"JSON: {label}", "application/json", json_body(image), IMAGE_STATUSES, IMAGE_CODES, True)
        else:
            body = damage(chance, multipart(("files", content)))
            codes = IMAGE_CODES | {"malformed_multipart", "missing_key", "unknown_key", "bad_option", "too_many_images"}
            yield BadInput(f"form: {label}", MULTIPART, body, IMAGE_STATUSES | {400}, codes, True)


def _flipped_bits(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 2, 8, 64))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _flipped_head(chance: random.Random, content: bytes) -> bytes:
    head = _flipped_bits(chance, content[:200])
    return head + content[200:]


def _cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def _inserted_bytes(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + chance.randbytes(chance.choice((1, 7, 500))) + content[place:]


def _removed_bytes(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.choice((1, 5, 100)) :]


def _repeated_bytes(chance: random.Random, content: bytes) -> bytes:
    start = chance.randrange(len(content))
    end = min(len(content), start + chance.choice((4, 64, 400)))
    return content[:end] + content[start:end] * chance.choice((1, 20)) + content[end:]


def _extreme_numbers(chance: random.Random, content: bytes) -> bytes:
    place = chance.randrange(max(1, min(len(content), 400) - 4))
    return (
        content[:place]
        + chance.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
        + content[place + 4 :]
    )


_DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flipped_bits,
    _flipped_head,
    _cut,
    _inserted_bytes,
    _removed_bytes,
    _repeated_bytes,
    _extreme_numbers,
)
