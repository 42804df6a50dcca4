import asyncio
import base64
import json
import random
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import pytest

from rafce_ray.service.batching import Admission
from rafce_ray.service.problems import Problem
from rafce_ray.service.requests import (
    PARSED_ON_THE_LOOP_BYTES,
    BodyRules,
    Options,
    PredictRequest,
    declared_bytes,
    decode_base64,
    parse_json,
    read_body,
    read_request,
)

RULES = BodyRules(max_images=3, max_image_bytes=200_000, num_emotions=5)
IMAGE = bytes(range(256))


def read(
    body: bytes, content_type: str | None, query: str = "", *, rules: BodyRules = RULES, chunk: int = 10**9
) -> PredictRequest:
    """The request as it is read when its body comes in chunks."""
    pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": position < len(pieces) - 1}
        for position, piece in enumerate(pieces)
    ]
    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    scope = {"headers": headers, "query_string": query.encode()}
    admission = Admission(1, 10**9)

    async def receive() -> dict:
        return messages.pop(0)

    async def run() -> PredictRequest:
        with admission.place() as place:
            request = await read_request(scope, receive, place, rules)
            assert admission.num_bytes == len(body)
            return request

    return asyncio.run(run())


def refused(body: bytes, content_type: str | None, query: str = "", rules: BodyRules = RULES) -> Problem:
    with pytest.raises(Problem) as caught:
        read(body, content_type, query, rules=rules)
    return caught.value


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def json_body(*images: dict, **options: object) -> bytes:
    return json.dumps({"images": list(images), "options": options}).encode()


def form(**fields: object) -> tuple[bytes, str]:
    """What another implementation, httpx's, makes of files and fields."""
    files = [("files", (f"{position}.jpg", content)) for position, content in enumerate(fields.pop("files", []))]
    request = httpx.Request("POST", "http://a", files=files, data={key: str(value) for key, value in fields.items()})
    return request.read(), request.headers["content-type"]


@pytest.mark.parametrize(
    "kind",
    [
        "image/jpeg",
        "image/png",
        "image/webp",
        "application/octet-stream",
        "IMAGE/JPEG",
        " image/jpeg ; charset=binary",
        'image/jpeg; name="a;b.jpg"',
        "image/jpg",
        "Image/PJPEG",
        "image/x-png",
        "binary/octet-stream",
    ],
)
@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_raw_body_is_one_image(kind, chunk):
    request = read(IMAGE, kind, chunk=chunk)
    assert request.kind == "raw"
    assert request.options == Options("detect", 3, False)
    assert [(item.id, item.content) for item in request.items] == [("0", IMAGE)]


def test_a_raw_bodys_options_are_in_the_query():
    assert read(IMAGE, "image/png", "faces=aligned&top_k=5&return_distribution=true").options == Options(
        "aligned", 5, True
    )
    assert read(IMAGE, "image/png", "return_distribution=false").options == Options()


def test_a_raw_body_that_is_too_large_is_not_kept():
    rules = BodyRules(1, 100, 5)
    assert refused(bytes(101), "image/jpeg", rules=rules).code == "too_many_bytes"
    assert read(bytes(100), "image/jpeg", rules=rules).items[0].content == bytes(100)


def test_a_json_body_has_images_in_order_with_ids_or_positions():
    body = json_body({"id": "a", "data": text(b"one")}, {"data": "data:image/png;base64," + text(b"two")}, {"data": ""})
    request = read(body, "application/json; charset=UTF-8")
    assert request.kind == "json"
    assert [(item.id, item.content) for item in request.items] == [("a", b"one"), ("1", b"two"), ("2", b"")]
    body = json_body({"data": text(b"x")}, faces="aligned", top_k=1, return_distribution=True)
    assert read(body, "application/json").options == Options("aligned", 1, True)


def test_a_form_has_images_in_order_whatever_their_bytes():
    contents = [b"", b"\r\n--\r\n\r\n--x--", IMAGE * 500]
    request = read(*form(files=contents, top_k=2, faces="aligned", return_distribution="true"), chunk=999)
    assert request.kind == "multipart"
    assert [(item.id, item.content) for item in request.items] == [
        (str(n), content) for n, content in enumerate(contents)
    ]
    assert request.options == Options("aligned", 2, True)


FORM = {
    "as it is": lambda body: body,
    "preamble": lambda body: b"This is a form.\r\n--no\r\n" + body,
    "empty preamble": lambda body: b"\r\n" + body,
    "epilogue": lambda body: body + b"Farewell.\r\n--b\r\n\r\nx",
    "no new line after the last boundary": lambda body: body.rstrip(),
    "blanks after boundaries": lambda body: body.replace(b"--b\r\n", b"--b \t\r\n").rstrip() + b" \t\r\n",
    "header names and values in capitals": lambda body: body.replace(
        b"Content-Disposition: form-data; name", b"CONTENT-DISPOSITION:Form-Data;NAME"
    ),
    "file name in RFC 5987's form": lambda body: body.replace(b'filename="x"', b"filename*=UTF-8''na%20me%22.jpg"),
    "file name of a path": lambda body: body.replace(b'filename="x"', b'filename="C:\\a;\\"b.jpg"'),
    "folded header": lambda body: body.replace(b"form-data; ", b"form-data;\r\n\t "),
    "name without quotes": lambda body: body.replace(b'"files"', b"files"),
    "other headers": lambda body: body.replace(
        b"Content-Disp", b"X: y\r\nContent-Transfer-Encoding: Binary\r\nContent-Disp"
    ),
}


@pytest.mark.parametrize("change", FORM.values(), ids=FORM)
@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=b", 'Multipart/Form-Data; charset=utf-8; Boundary="b"']
)
def test_a_form_may_have_all_that_the_standard_allows(change, kind):
    contents = [IMAGE, b"", b"\r\n\r\n --b."]
    parts = [b'--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n' + one for one in contents]
    body = change(b"\r\n".join(parts) + b"\r\n--b--\r\n")
    assert [item.content for item in read(body, kind).items] == contents


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            b'--c\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--c--',
            "No line of the body is the boundary",
        ),
        (b'--b\nContent-Disposition: form-data; name="files"\n\nx\n--b--', "LF alone"),
        (b"--bx\r\n\r\nx\r\n--b--", "followed by something else"),
        (b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b', "followed by something else"),
        (b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n', "cut short"),
        (
            b"--b\r\nContent-Transfer-Encoding: base64\r\nContent-Disposition: form-data; "
            b'name="files"\r\n\r\nx\r\n--b--',
            "Content-Transfer-Encoding is 'base64'",
        ),
    ],
)
def test_a_form_that_cannot_be_read_is_refused_with_the_reason(body, said):
    problem = refused(body, "multipart/form-data; boundary=b")
    assert problem.code == "malformed_multipart"
    assert said in problem.detail


def test_a_bad_image_does_not_fail_its_neighbours():
    body = json_body({"data": text(b"one")}, {"data": "a"}, {"data": text(bytes(200_001))})
    first, second, third = (item.content for item in read(body, "application/json").items)
    assert first == b"one"
    assert (second.code, third.code) == ("bad_base64", "too_many_bytes")
    first, second = (item.content for item in read(*form(files=[bytes(200_001), b"two"])).items)
    assert (first.code, second) == ("too_many_bytes", b"two")


def test_a_large_body_is_parsed_in_the_pool():
    used = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments, **options):
            used.append(arguments)
            return super().submit(*arguments, **options)

    def read_in(pool: Pool, content: bytes) -> PredictRequest:
        async def receive() -> dict:
            return {"type": "http.request", "body": json_body({"data": text(content)})}

        async def run() -> PredictRequest:
            scope = {"headers": [(b"content-type", b"application/json")], "query_string": b""}
            with Admission(1, 10**9).place() as place:
                return await read_request(scope, receive, place, RULES, pool)

        return asyncio.run(run())

    large = random.Random(0).randbytes(PARSED_ON_THE_LOOP_BYTES)
    with Pool(1) as pool:
        assert read_in(pool, b"small").items[0].content == b"small"
        assert used == []
        assert read_in(pool, large).items[0].content == large
        assert len(used) == 1


def test_the_number_of_images_is_bounded():
    images = [{"data": text(b"x")}] * 4
    problem = refused(json_body(*images), "application/json")
    assert (problem.code, problem.status) == ("too_many_images", 413)
    problem = refused(*form(files=[b"x"] * 4))
    assert (problem.code, problem.status) == ("too_many_images", 413)
    assert len(read(*form(files=[b"x"] * 3, top_k=1, faces="detect", return_distribution="true")).items) == 3


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b'{"images": [{"data": ""}, {"data": ""}, {"data": 5}]}', "wrong_type", "images[2].data is a number."),
        (b'{"images": [{"data": "", "id": null}]}', "wrong_type", "images[0].id is null."),
        (b'{"images": {"data": ""}}', "wrong_type", "images is an object."),
        (b'{"images": [{"dat": ""}]}', "unknown_key", "Images[0] has an unknown key 'dat'."),
        (b'{"images": [{}]}', "missing_key", "Images[0] has no data."),
        (b'{"images": [{"data": ""}], "options": []}', "wrong_type", "options is an array."),
        (b'{"images": [{"data": "", "data": ""}]}', "duplicate_key", "An object has the key 'data' more than once."),
        (b'{"images": [NaN]}', "malformed_json", "NaN is no JSON."),
        (b'{"images": [}', "malformed_json", "The body is not JSON: Expecting value at line 1, column 13."),
        (b'{"images": "\xff"}', "malformed_json", "The body is not UTF-8 at byte 12."),
        (
            b'{"images": [{"data": "", "id": "a"}, {"data": "", "id": "a"}]}',
            "duplicate_id",
            "images[0] and images[1] have the same id 'a'.",
        ),
        (
            b'{"images": [{"data": "", "id": "1"}, {"data": ""}]}',
            "duplicate_id",
            "images[0] and images[1] have the same id '1'.",
        ),
    ],
)
def test_what_is_wrong_with_json_is_said_by_its_place(body, code, said):
    problem = refused(body, "application/json")
    assert (problem.code, problem.detail) == (code, said)


def test_the_nearest_known_name_is_told():
    assert (
        refused(b'{"image": []}', "application/json").hint
        == "Did you mean 'images'? The body may have images and options."
    )
    problem = refused(json_body({"data": ""}, topk=1), "application/json")
    assert problem.detail == "There is no option 'topk'."
    assert problem.hint == "Did you mean 'top_k'? The options are faces, top_k, return_distribution."
    assert refused(IMAGE, "image/png", "face=aligned").hint.startswith("Did you mean 'faces'?")
    body, content_type = form(files=[b"x"])
    problem = refused(body.replace(b'name="files"', b'name="file"'), content_type)
    assert problem.hint.startswith("Did you mean 'files'? Images are parts named files;")
    assert refused(IMAGE, "image/jpgg").hint.startswith("Did you mean 'image/jpeg'?")
    assert refused(IMAGE, "image/tiff").hint.startswith("Save the picture as JPEG, PNG or WebP. Use one of")
    assert refused(IMAGE, "application/x-www-form-urlencoded").hint.startswith("Use one of image/jpeg,")


@pytest.mark.parametrize(("num_emotions", "default", "most"), [(14, 3, 14), (2, 2, 2), (0, 1, 1)])
def test_top_k_is_bounded_by_the_model(num_emotions, default, most):
    rules = BodyRules(3, 1000, num_emotions)
    assert read(IMAGE, "image/png", rules=rules).options.top_k == default
    assert read(IMAGE, "image/png", f"top_k={most}", rules=rules).options.top_k == most
    problem = refused(IMAGE, "image/png", f"top_k={most + 1}", rules=rules)
    assert (problem.detail, problem.hint) == (
        f"The option top_k is {most + 1}.",
        f"Give a whole number from 1 to {most}.",
    )


def test_options_are_strict_about_types():
    for options in ({"top_k": True}, {"top_k": 1.0}, {"top_k": "1"}, {"return_distribution": 1}, {"faces": ["detect"]}):
        assert refused(json_body({"data": ""}, **options), "application/json").code == "bad_option"


def test_a_query_has_no_place_beside_other_bodies():
    problem = refused(json_body({"data": ""}), "application/json", "top_k=1")
    assert (problem.code, problem.hint) == ("unknown_option", "Put them into the key options.")


def test_depth_and_members_bound_json_before_it_is_parsed():
    assert parse_json(b"[[[[1]]]]", max_marks=4) == [[[[1]]]]
    for body in (b"[[[[[1]]]]]", b"[1,1,1,1,1]", b'{"a":1,"b":2}'):
        with pytest.raises(Problem, match="json_too_complex"):
            parse_json(body, max_marks=3)
    with pytest.raises(Problem, match="json_too_complex"):
        parse_json(b"[" * 10**5 + b"]" * 10**5, max_marks=10**6)


FORMS_OF_BASE64 = {
    "standard": base64.b64encode,
    "line breaks": base64.encodebytes,
    "CR LF": lambda content: base64.encodebytes(content).replace(b"\n", b"\r\n"),
    "last new line": lambda content: base64.b64encode(content) + b"\n",
    "no padding": lambda content: base64.b64encode(content).rstrip(b"="),
    "URL alphabet": base64.urlsafe_b64encode,
    "URL alphabet without padding": lambda content: base64.urlsafe_b64encode(content).rstrip(b"="),
    "data URI": lambda content: b"data:image/jpeg;base64," + base64.b64encode(content),
    "data URI with all of it": lambda content: b"\nDATA:image/png;a=b;BASE64,\r\n" + base64.encodebytes(content),
}


@pytest.mark.parametrize("encode", FORMS_OF_BASE64.values(), ids=FORMS_OF_BASE64)
def test_every_usual_form_of_base64_is_read_at_any_length(encode):
    chance = random.Random(0)
    for size in (*range(8), 3 * 2**16 - 1, 3 * 2**16, 3 * 2**16 + 1, 2**19 + 5):
        content = chance.randbytes(size)
        assert decode_base64(encode(content).decode(), size) == content
        if size:
            with pytest.raises(Problem, match="too_many_bytes"):
                decode_base64(encode(content).decode(), size - 1)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("a", "cut short"),
        ("\nabcd\ne\n", "has 5 characters without blanks and padding, which no base64 has: it is cut short"),
        ("a===", "cut short"),
        ("====", "too much padding"),
        ("YWE==", "too much padding"),
        ("ab=c", "padding (=) at character 2,"),
        ("YQ==YQ==", "padding (=) at character 2,"),
        ("ab-_+", "mixes two alphabets"),
        ("äöüß", r"has '\xe4' at character 0."),
        ("http://a/b", "has ':' at character 4."),
        ("%2Babc", "has '%' at character 0."),
        ("ab cd e", "It has blanks and no +: a program may have read + as a blank, as in forms."),
    ],
)
def test_other_base64_is_refused_with_the_reason(bad, said):
    with pytest.raises(Problem, match="bad_base64") as caught:
        decode_base64(bad, 100)
    assert said in caught.value.detail
    # The same at a later piece of a long text.
    with pytest.raises(Problem, match="bad_base64"):
        decode_base64("A" * 2**18 + bad, 10**6)


def test_a_client_that_goes_away_is_noticed():
    messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict:
        return messages.pop(0)

    with Admission(1, 100).place() as place, pytest.raises(Problem, match="client_gone"):
        asyncio.run(read_body(receive, place))


def test_bytes_beyond_those_of_all_are_busy():
    async def receive() -> dict:
        return {"type": "http.request", "body": bytes(60), "more_body": True}

    with Admission(1, 100).place() as place:
        with pytest.raises(Problem, match="busy"):
            asyncio.run(read_body(receive, place))
        assert place.num_bytes == 60


def test_the_declared_length_is_read():
    assert declared_bytes({"headers": [(b"a", b"1"), (b"content-length", b"42")]}) == 42
    assert declared_bytes({"headers": []}) == 0


def test_ids_may_be_any_printable_text():
    for id_ in ("a b", "ä", "日本", "x" * 128, quote("/../x")):
        assert read(json_body({"data": "", "id": id_}), "application/json").items[0].id == id_
