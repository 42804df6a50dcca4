"""``/v1/admin``: what is live is changed by key, by name, past gates, without stopping what goes on."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rafce_ray.base.storage import locate
from rafce_ray.bundle.bundle import load_bundle, save_bundle
from rafce_ray.registry import gates
from rafce_ray.registry.live import read_history
from rafce_ray.registry.promotion import Reason, Rules, promote, roll_back
from rafce_ray.registry.versions import add_version
from rafce_ray.service import admin
from rafce_ray.service.app import build_app
from rafce_ray.service.config import read_service_config
from rafce_ray.service.keys import new_key
from rafce_ray.service.state import Service

RULES = Rules(max_latency_ratio=1000, engine="torch")


@pytest.fixture(scope="module", autouse=True)
def quick_gates() -> Iterator[None]:
    """Times of the tiny network are taken once, and say nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MIN_ROUNDS", 1), ("MAX_ROUNDS", 1), ("WARM_UPS", 0)):
            patch.setattr(gates, name, value)
        patch.setattr(Rules, "__init__", _never_slow)
        yield


_RULES_INIT = Rules.__init__


def _never_slow(self: Rules, max_latency_ratio: float = 1000, engine: str = "torch") -> None:
    _RULES_INIT(self, max_latency_ratio, engine)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory, bundle_path: Path) -> Path:
    """A registry of versions ``one``, which is live, ``two`` and ``damaged``."""
    folder = tmp_path_factory.mktemp("admin")
    bundle = load_bundle(bundle_path)
    parts = ("model", "architecture", "taxonomy", "preprocessing", "calibration", "metrics", "provenance")
    bundle.model.emotion_head.flat.bias.data.add_(0.1)
    save_bundle(folder / "other", **{name: getattr(bundle, name) for name in parts})
    registry = locate(folder / "registry")
    for name, source in (("one", bundle_path), ("two", folder / "other"), ("damaged", folder / "other")):
        add_version(registry, str(source), name)
    weights = folder / "registry" / "versions" / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    promote(registry, "one", Reason(by="me"), RULES)
    return folder / "registry"


@pytest.fixture
def registry(tmp_path: Path, master: Path) -> Path:
    return shutil.copytree(master, tmp_path / "registry")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys.json"
    return {
        "admin": new_key(file, "ops", frozenset({"admin"})),
        "predict": new_key(file, "app", frozenset({"predict"})),
    }


@pytest.fixture
def service(registry: Path, keys: dict[str, str]) -> Iterator[Service]:
    values = {"registry": str(registry), "keys_file": str(registry.parent / "keys.json"), "engine": "torch"}
    service = Service(read_service_config(values | {"watch_s": 3600, "max_batch_faces": 1}))
    yield service
    service.close()


@pytest.fixture
def ask(service: Service, keys: dict[str, str]):
    """``ask("promote", {"version": "two"})``: the response to an administrator's request."""

    async def send(path: str, body: object, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(build_app(service), client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            if path == "versions":
                return await client.get(f"/v1/admin/{path}")
            content = {"content": body} if isinstance(body, bytes) else {"json": body}
            return await client.post(f"/v1/admin/{path}", **content)

    return lambda path, body=b"", key=keys["admin"]: asyncio.run(send(path, body, key))


def test_only_a_key_of_an_administrator_will_do(ask, keys, registry):
    before = (registry / "live.json").read_bytes()
    for path in ("reload", "promote", "rollback", "versions"):
        assert ask(path, {"version": "two"}, None).status_code == 401
        refused = ask(path, {"version": "two"}, keys["predict"])
        assert (refused.status_code, refused.json()["type"]) == (403, "/problems/scope_missing")
    assert (registry / "live.json").read_bytes() == before


def test_versions_are_listed_with_what_is_live(ask):
    found = ask("versions").json()
    assert {one["version"]: one["is_live"] for one in found["versions"]} == {
        "one": True,
        "two": False,
        "damaged": False,
    }
    assert (found["live"]["version"], found["live"]["by"], found["live"]["why"]) == ("one", "me", "the first version")


def test_promoting_and_rolling_back_change_what_is_served_at_once(ask, registry, service):
    done = ask("promote", {"version": "two", "why": "it is better"})
    assert done.status_code == 200, done.text
    answer = done.json()
    assert (answer["changed"], answer["swapped"], answer["serves"]["version"]) == (True, True, "two")
    assert answer["others_follow_within_s"] == 3600
    assert [gate["name"] for gate in answer["live"]["gates"]] == [
        "integrity",
        "canary",
        "taxonomy",
        "metrics",
        "latency",
    ]
    assert service.live.served.model.version == "two"
    again = ask("promote", {"version": "two"}).json()
    assert (again["changed"], again["swapped"]) == (False, False)
    back = ask("rollback").json()
    assert (back["serves"]["version"], service.live.served.model.version) == ("one", "one")
    no_more = ask("rollback")
    assert (no_more.status_code, no_more.json()["type"]) == (409, "/problems/change_refused")
    history = read_history(locate(registry))
    assert [(one.version, one.by, one.why) for one in history[1:]] == [
        ("two", "key ops", "it is better"),
        ("one", "key ops", "rolled back from two"),
    ]


def test_what_the_gates_refuse_is_told_with_their_figures_and_changes_nothing(ask, registry, service):
    before, served = (registry / "live.json").read_bytes(), service.live.served
    refused = ask("promote", {"version": "damaged", "force": True, "why": "I insist"})
    assert (refused.status_code, refused.headers["content-type"]) == (409, "application/problem+json")
    problem = refused.json()
    assert problem["type"] == "/problems/change_refused"
    (gate,) = problem["gates"]
    assert (gate["name"], gate["verdict"], "cut short" in gate["detail"]) == ("integrity", "refused", True)
    assert (registry / "live.json").read_bytes() == before
    assert service.live.served is served


def test_reload_looks_at_once(ask, registry, service):
    assert ask("reload").json()["swapped"] is False
    promote(locate(registry), "two", Reason(), RULES)
    found = ask("reload", {}).json()
    assert (found["swapped"], found["serves"]["version"], found["live"]) == (True, "two", None)
    roll_back(locate(registry), Reason(), RULES)
    assert ask("reload").json()["serves"]["version"] == "one"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("promote", b"", 400, "missing_key"),
        ("promote", b"{", 400, "malformed_json"),
        ("promote", b"[1]", 400, "wrong_type"),
        ("promote", {"version": 3}, 400, "wrong_type"),
        ("promote", {"version": "two", "force": "yes"}, 400, "wrong_type"),
        ("promote", {"verison": "two"}, 400, "unknown_key"),
        ("promote", b'{"version": "two", "version": "one"}', 400, "duplicate_key"),
        ("promote", {"version": "two", "force": True}, 400, "bad_request"),
        ("promote", {"version": "two", "why": "two\nlines"}, 400, "bad_request"),
        ("promote", {"version": "three"}, 404, "no_such_version"),
        ("promote", {"version": "../registry/versions/two"}, 404, "no_such_version"),
        ("promote", {"version": ".."}, 404, "no_such_version"),
        ("promote", {"version": "http://127.0.0.1/two"}, 404, "no_such_version"),
        ("promote", {"version": "s3://bucket/two"}, 404, "no_such_version"),
        ("promote", {"version": "two\x00"}, 404, "no_such_version"),
        ("promote", {"version": "x" * 20_000}, 413, "body_too_large"),
        ("rollback", {"version": "one"}, 400, "unknown_key"),
        ("reload", {"place": "/"}, 400, "unknown_key"),
    ],
)
def test_requests_that_are_refused_change_nothing(ask, registry, path, body, status, code):
    before = (registry / "live.json").read_bytes()
    found = ask(path, body)
    assert (found.status_code, found.json()["type"]) == (status, f"/problems/{code}")
    assert (registry / "live.json").read_bytes() == before


def test_one_change_at_a_time_and_the_service_answers_meanwhile(service, keys, monkeypatch):
    entered, leave = threading.Event(), threading.Event()

    def slow_promote(*arguments: object) -> object:
        entered.set()
        assert leave.wait(30)
        return promote(*arguments)

    monkeypatch.setattr(admin, "promote", slow_promote)

    async def both() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(build_app(service), client=("127.0.0.1", 1))
        headers = {"authorization": f"Bearer {keys['admin']}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            first = asyncio.create_task(client.post("/v1/admin/promote", json={"version": "two"}))
            await asyncio.to_thread(entered.wait, 30)
            health = await client.get("/healthz")
            second = await client.post("/v1/admin/rollback")
            leave.set()
            return await first, health, second

    first, health, second = asyncio.run(both())
    assert (first.status_code, health.status_code) == (200, 200)
    assert (second.status_code, second.json()["type"], second.headers["retry-after"]) == (429, "/problems/busy", "5")
    assert service.live.served.model.version == "two"


def test_a_service_of_a_bundle_folder_has_no_versions(bundle_path, keys, tmp_path):
    values = {"bundle": str(bundle_path), "keys_file": str(tmp_path / "keys.json"), "engine": "torch"}
    service = Service(read_service_config(values | {"watch_s": 3600, "max_batch_faces": 1}))

    async def send() -> list[httpx.Response]:
        transport = httpx.ASGITransport(build_app(service), client=("127.0.0.1", 1))
        headers = {"authorization": f"Bearer {keys['admin']}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            changes = [await client.post(f"/v1/admin/{path}") for path in ("promote", "rollback")]
            return [*changes, await client.get("/v1/admin/versions"), await client.post("/v1/admin/reload")]

    *refused, reloaded = asyncio.run(send())
    service.close()
    assert [one.status_code for one in refused] == [409] * 3
    assert (reloaded.status_code, reloaded.json()["swapped"]) == (200, False)
