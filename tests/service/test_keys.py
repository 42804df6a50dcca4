import json
import logging
import os
import stat
from hashlib import sha256
from pathlib import Path

import pytest

from rafce_ray.base.errors import UsageError
from rafce_ray.service.keys import KEY_ID, MAX_PEERS, Keys, main, new_key, read_keys
from rafce_ray.service.problems import Problem


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def write_keys(file: Path, **scopes: list[str]) -> None:
    """A file of keys whose secrets are their ids with "-secret" behind."""
    keys = [
        {"id": id_, "sha256": sha256(f"{id_}-secret".encode()).hexdigest(), "scopes": of} for id_, of in scopes.items()
    ]
    file.write_text(json.dumps({"keys": keys}))


def scope_with(authorization: str | None, peer: str = "192.0.2.1") -> dict:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return {"headers": headers, "client": (peer, 5)}


def refused(keys: Keys, scope: dict, needed: str = "predict") -> Problem:
    with pytest.raises(Problem) as caught:
        keys.authorize(scope, needed)
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.json"
    write_keys(file, ann=["predict"], root=["admin"], both=["predict", "admin"])
    return file


def test_a_key_may_do_what_its_scopes_say(file):
    keys = Keys(file)
    for id_, needed in [("ann", "predict"), ("root", "admin"), ("both", "predict"), ("both", "admin")]:
        scope = scope_with(f"Bearer {id_}-secret")
        keys.authorize(scope, needed)
        assert scope[KEY_ID] == id_
    for id_, needed in [("ann", "admin"), ("root", "predict")]:
        scope = scope_with(f"bearer  {id_}-secret")
        assert refused(keys, scope, needed).code == "scope_missing"
        assert scope[KEY_ID] == id_


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic YTpi", "ann-secret", "Bearer " + "x" * 513])
def test_without_a_bearer_key_one_is_asked_for(file, header):
    problem = refused(Keys(file), scope_with(header))
    assert (problem.code, problem.status) == ("key_needed", 401)
    assert problem.headers == {"www-authenticate": "Bearer"}


def test_a_wrong_key_is_refused_and_leaves_no_id(file):
    scope = scope_with("Bearer ann-secreT")
    problem = refused(Keys(file), scope)
    assert (problem.code, problem.status) == ("wrong_key", 401)
    assert KEY_ID not in scope
    assert "ann-secreT" not in problem.detail + problem.hint


def test_the_hash_is_no_key(file):
    digest = json.loads(file.read_text())["keys"][0]["sha256"]
    assert refused(Keys(file), scope_with(f"Bearer {digest}")).code == "wrong_key"


def test_without_a_file_everybody_predicts_and_nobody_administrates():
    keys = Keys(None)
    keys.authorize(scope_with(None), "predict")
    assert refused(keys, scope_with("Bearer x"), "admin").code == "scope_missing"


def test_wrong_keys_are_slowed_down_by_peer_and_right_ones_are_not(file):
    clock = Clock()
    keys = Keys(file, clock=clock)
    wrong = scope_with("Bearer wrong")
    assert [refused(keys, wrong).code for _ in range(12)] == ["wrong_key"] * 10 + ["too_many_wrong_keys"] * 2
    clock.now += 15
    problem = refused(keys, wrong)
    assert (problem.status, problem.headers) == (429, {"retry-after": "45"})
    keys.authorize(scope_with("Bearer ann-secret"), "predict")
    assert refused(keys, scope_with("Bearer wrong", peer="192.0.2.2")).code == "wrong_key"
    clock.now += 45
    assert refused(keys, wrong).code == "wrong_key"


def test_the_record_of_peers_is_bounded(file):
    keys = Keys(file)
    for number in range(MAX_PEERS + 50):
        refused(keys, scope_with("Bearer wrong", peer=str(number)))
    assert len(keys._wrong._counts) == MAX_PEERS


def test_a_changed_file_is_read_again(file, caplog):
    clock = Clock()
    keys = Keys(file, clock=clock)
    write_keys(file, bob=["predict"])
    keys.authorize(scope_with("Bearer ann-secret"), "predict")  # It was looked at less than a second ago.
    clock.now += 1
    with caplog.at_level(logging.INFO):
        assert refused(keys, scope_with("Bearer ann-secret")).code == "wrong_key"
    keys.authorize(scope_with("Bearer bob-secret"), "predict")
    assert [record.fields for record in caplog.records] == [{"key_ids": ["bob"]}]


@pytest.mark.parametrize("damage", ["", "{", '{"keys": []}', None])
def test_an_unusable_new_file_keeps_the_old_keys(file, caplog, damage):
    clock = Clock()
    keys = Keys(file, clock=clock)
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage)
    for _ in range(3):
        clock.now += 2
        keys.authorize(scope_with("Bearer ann-secret"), "predict")
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # Once, not at every look.
    write_keys(file, bob=["predict"])
    clock.now += 2
    keys.authorize(scope_with("Bearer bob-secret"), "predict")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"keys": [], "kees": []}', "kees: Extra inputs"),
        ('{"keys": [{"id": "a", "sha256": "plain text", "scopes": ["predict"]}]}', "keys.0.sha256"),
        ('{"keys": [{"id": "a b", "sha256": "' + "0" * 64 + '", "scopes": ["predict"]}]}', "keys.0.id"),
        ('{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": ["all"]}]}', "keys.0.scopes"),
        ('{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": []}]}', "keys.0.scopes"),
        ('{"keys": []}', "holds no key"),
    ],
)
def test_an_unusable_file_is_told(tmp_path, content, said):
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=said) as caught:
        Keys(file)
    assert str(file) in str(caught.value)
    assert "keys new NAME" in str(caught.value)


def test_a_name_that_is_set_twice_is_told_with_its_lines(tmp_path):
    file = tmp_path / "keys.json"
    file.write_text(
        '{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '",\n\t"scopes": ["predict"],\n\t"scopes": ["admin"]}]}'
    )
    with pytest.raises(UsageError) as caught:
        read_keys(file)
    assert str(caught.value) == f"{file}: 'keys[0].scopes' is set twice, on lines 2 and 3. Set it once."


def test_a_missing_file_and_double_ids_are_told(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "none.json")
    file = tmp_path / "keys.json"
    key = {"id": "a", "sha256": "0" * 64, "scopes": ["predict"]}
    file.write_text(json.dumps({"keys": [key, {**key, "sha256": "1" * 64}]}))
    with pytest.raises(UsageError, match="two keys have the id a"):
        read_keys(file)


def test_new_keys_work_and_are_stored_as_hashes_only(tmp_path, capsys):
    file = tmp_path / "sub" / "keys.json"
    assert main(["new", "ann", "--file", str(file)]) == 0
    ann = capsys.readouterr().out.strip()
    root = new_key(file, "root", frozenset({"admin"}))
    assert ann != root
    assert min(len(ann), len(root)) >= 43
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert ann not in file.read_text()
    assert root not in file.read_text()
    assert os.listdir(file.parent) == ["keys.json"]
    keys = Keys(file)
    keys.authorize(scope_with(f"Bearer {ann}"), "predict")
    keys.authorize(scope_with(f"Bearer {root}"), "admin")
    assert main(["new", "ann", "--file", str(file)]) == 2
    assert main(["new", "a b", "--file", str(file)]) == 2
    assert [key.id for key in read_keys(file)] == ["ann", "root"]
