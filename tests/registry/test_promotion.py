"""Promotion and rollback: what may become live does, what may not changes nothing."""

import json
import shutil

import fsspec
import pytest
from pyarrow.fs import FSSpecHandler, PyFileSystem

from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.registry import promotion
from rafce_ray.registry.live import read_history, read_live, replace_live
from rafce_ray.registry.promotion import Reason, Refused, promote, roll_back, take_candidate
from rafce_ray.registry.versions import add_version, list_versions, version_folder, version_names


def gate_of(found, name):
    (gate,) = (gate for gate in found.gates if gate.name == name)
    return gate


def test_a_version_is_the_bundle_copied_whole_and_never_altered(tmp_path, make_bundle):
    registry = locate(tmp_path / "registry")
    bundle = make_bundle()
    name, is_new = add_version(registry, str(bundle))
    assert is_new
    stored = tmp_path / "registry" / "versions" / name
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == {
        path.name: path.read_bytes() for path in bundle.iterdir()
    }
    assert load_bundle(version_folder(registry, name).uri).weights_sha256.startswith(name)
    assert add_version(registry, str(bundle)) == (name, False)
    with pytest.raises(UsageError, match="is another bundle; versions are never altered"):
        add_version(registry, str(make_bundle(1)), name)
    assert load_bundle(version_folder(registry, name).uri).weights_sha256.startswith(name)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a b", "x" * 65, "ä", "a\n"])
def test_no_name_leads_out_of_the_registry(registry, make_bundle, name):
    with pytest.raises(UsageError, match="names are"):
        add_version(locate(registry), str(make_bundle()), name)
    with pytest.raises(UsageError, match="names are"):
        version_folder(locate(registry), name)


def test_what_a_program_that_died_left_of_a_version_is_none_and_is_replaced(tmp_path, make_bundle):
    left = tmp_path / "versions" / "new"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    registry = locate(tmp_path)
    assert version_names(registry) == []
    assert add_version(registry, str(make_bundle()), "new") == ("new", True)
    load_bundle(version_folder(registry, "new").uri)


def test_the_first_version_has_nothing_to_compare_with(two_versions):
    first, second = read_history(locate(two_versions))
    assert [(gate.name, gate.verdict) for gate in first.gates] == [
        ("integrity", "passed"),
        ("canary", "passed"),
        ("taxonomy", "nothing to compare with"),
        ("metrics", "nothing to compare with"),
        ("latency", "nothing to compare with"),
    ]
    assert (first.version, first.by, first.before) == ("one", "user0", ())
    assert {gate.verdict for gate in second.gates} == {"passed"}
    assert (second.version, second.before, second.overruled) == ("two", ("one",), ())


def cut_short(bundle, replace_weights):
    content = (bundle / "model.safetensors").read_bytes()
    (bundle / "model.safetensors").write_bytes(content[:-100])


def flip_a_bit(bundle, replace_weights):
    content = bytearray((bundle / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(content)


def not_a_number(bundle, replace_weights):
    replace_weights(bundle, lambda weights: weights["au_head.bias"].fill_(float("nan")))


def no_manifest(bundle, replace_weights):
    (bundle / "bundle.json").write_bytes(b'{"format_version"')


@pytest.mark.parametrize(
    ("when", "spoil", "told"),
    [
        ("before it is added", cut_short, "cut short"),
        ("before it is added", flip_a_bit, "was altered: sha256"),
        ("before it is added", not_a_number, "NaN or infinite"),
        ("before it is added", no_manifest, "is not JSON"),
        ("after", flip_a_bit, "was altered: sha256"),
        ("after", no_manifest, "is not JSON"),
    ],
)
def test_a_damaged_bundle_is_refused_and_what_is_live_is_untouched(
    registry, tmp_path, make_bundle, replace_weights, rules, when, spoil, told
):
    before = (registry / "live.json").read_bytes()
    place, name = locate(registry), "bad"
    source = shutil.copytree(make_bundle(2), tmp_path / "source")
    if when == "after":
        add_version(place, str(source), name)
        source = registry / "versions" / name
    spoil(source, replace_weights)
    forced = Reason("I insist", force=True)
    attempts = {
        "before it is added": lambda: take_candidate(place, str(source), name),
        "after": lambda: promote(place, name, forced, rules),
    }
    with pytest.raises(Refused, match=told) as caught:
        attempts[when]()
    assert (caught.value.exit_code, gate_of(caught.value, "integrity").verdict) == (3, "refused")
    assert "force does not help" in str(caught.value)
    assert (registry / "live.json").read_bytes() == before
    assert len(read_history(place)) == 2
    assert (registry / "versions" / name).exists() == (when == "after")


def test_weights_that_answer_otherwise_than_when_they_were_saved_are_refused(
    registry, tmp_path, make_bundle, replace_weights, rules
):
    before = (registry / "live.json").read_bytes()
    source = shutil.copytree(make_bundle(2), tmp_path / "source")
    replace_weights(source, lambda weights: weights["au_head.bias"].add_(0.5))
    version, _ = take_candidate(locate(registry), str(source))
    with pytest.raises(Refused, match="canary: Probabilities") as caught:
        promote(locate(registry), version, Reason("I insist", force=True), rules)
    assert gate_of(caught.value, "integrity").verdict == "passed"
    assert (registry / "live.json").read_bytes() == before


def test_gates_that_compare_are_refused_together_and_may_be_overruled(registry, make_bundle, metrics, rules):
    before = (registry / "live.json").read_bytes()
    place = locate(registry)
    worse = make_bundle(3, metrics(0.3, 0.2), emotions=("calm", "happily surprised", "sadly angry"))
    version, _ = take_candidate(place, str(worse))
    with pytest.raises(Refused) as caught:
        promote(place, version, Reason(), rules)
    assert [gate.verdict for gate in caught.value.gates] == ["passed", "passed", "refused", "refused", "passed"]
    assert "score 0.250 against 0.400 (95 % interval 0.300 to 0.500)" in str(caught.value)
    assert f"{version} --force --why" in str(caught.value)
    assert (registry / "live.json").read_bytes() == before
    outcome = promote(place, version, Reason("the old names were wrong", force=True, by="me"), rules)
    assert outcome.changed
    last = read_history(place)[-1]
    assert last == outcome.live == read_live(place)
    assert (last.overruled, last.why, last.by) == (("taxonomy", "metrics"), "the old names were wrong", "me")
    assert last.may_change_taxonomy


def test_force_needs_a_reason_of_one_line():
    with pytest.raises(UsageError, match="needs its reason"):
        Reason(force=True)
    for why in ("", "  ", "two\nlines", "x" * 501):
        with pytest.raises(UsageError, match="one line"):
            Reason(why)


def test_rolling_back_walks_back_and_a_promotion_after_it_starts_from_there(registry, make_bundle, rules):
    place = locate(registry)
    add_version(place, str(make_bundle(4)), "three")
    promote(place, "three", Reason(), rules)
    assert not promote(place, "three", Reason(), rules).changed
    assert roll_back(place, Reason("it was slow"), rules).live.version == "two"
    assert roll_back(place, Reason(), rules).live.version == "one"
    before = (registry / "live.json").read_bytes()
    with pytest.raises(UsageError, match="nothing was live before one"):
        roll_back(place, Reason(), rules)
    assert (registry / "live.json").read_bytes() == before
    promote(place, "three", Reason(), rules)
    assert roll_back(place, Reason(), rules).live.version == "one"
    told = [(one.action, one.version) for one in read_history(place)]
    assert told == [
        *(("promote", name) for name in ("one", "two", "three")),
        *(("rollback", name) for name in ("two", "one")),
        ("promote", "three"),
        ("rollback", "one"),
    ]
    assert [one.why for one in read_history(place)][3:5] == ["it was slow", "rolled back from two"]


def test_a_version_that_is_damaged_by_now_is_not_rolled_back_to(registry, rules):
    before = (registry / "live.json").read_bytes()
    flip_a_bit(registry / "versions" / "one", None)
    with pytest.raises(Refused, match="was altered"):
        roll_back(locate(registry), Reason(), rules)
    assert (registry / "live.json").read_bytes() == before


def test_a_live_version_that_cannot_be_read_passes_nothing_by_itself(registry, make_bundle, rules):
    place = locate(registry)
    flip_a_bit(registry / "versions" / "two", None)
    add_version(place, str(make_bundle(4)), "three")
    with pytest.raises(Refused, match="live version cannot be read") as caught:
        promote(place, "three", Reason(), rules)
    assert [gate.verdict for gate in caught.value.gates] == ["passed", "passed", "refused", "refused", "refused"]
    assert promote(place, "three", Reason("the live one is damaged", force=True), rules).changed


def test_who_is_overtaken_while_the_gates_are_asked_changes_nothing(registry, make_bundle, rules, monkeypatch):
    place = locate(registry)
    add_version(place, str(make_bundle(4)), "three")
    examine = promotion.examine

    def and_meanwhile(*arguments, **options):
        seen = read_live(place)
        update = {"number": seen.number + 1, "version": "one", "by": "the other", "before": ("two", "one")}
        replace_live(place, seen, seen.model_copy(update=update))
        return examine(*arguments, **options)

    monkeypatch.setattr(promotion, "examine", and_meanwhile)
    with pytest.raises(GateError, match="the other made one live meanwhile"):
        promote(place, "three", Reason("anyway", force=True), rules)
    assert read_live(place).version == "one"


def test_a_candidate_is_a_version_or_a_place(registry, make_bundle, tmp_path, monkeypatch):
    place = locate(registry)
    assert take_candidate(place, "one") == ("one", False)
    with pytest.raises(UsageError, match="keeps its name"):
        take_candidate(place, "one", "another")
    with pytest.raises(UsageError, match=r"'tow' is no version .*one, two.*nothing is there"):
        take_candidate(place, "tow")
    shutil.copytree(make_bundle(5), tmp_path / "run" / "bundle")
    monkeypatch.chdir(tmp_path)
    assert take_candidate(place, "run", "five") == ("five", True)


def test_a_broken_version_is_listed_with_its_problem(registry):
    (registry / "versions" / "one" / "bundle.json").write_bytes(b"{")
    found = {version.name: version.problem for version in list_versions(locate(registry))}
    assert found["two"] is None
    assert "cannot be read" in found["one"]


def test_a_registry_on_an_object_store(make_bundle, metrics, rules, tmp_path):
    memory = PyFileSystem(FSSpecHandler(fsspec.filesystem("memory")))
    registry = Location(memory, str(tmp_path), f"memory:/{tmp_path}")
    assert registry.local is None
    for seed, name in enumerate(("one", "two")):
        add_version(registry, str(make_bundle(seed)), name)
        promote(registry, name, Reason(), rules)
    add_version(registry, str(make_bundle(6, metrics(0.1, 0.1))), "worse")
    before = (registry / "live.json").read_bytes()
    with pytest.raises(Refused):
        promote(registry, "worse", Reason(), rules)
    assert (registry / "live.json").read_bytes() == before
    assert roll_back(registry, Reason(), rules).live.version == "one"
    assert sorted(version.name for version in list_versions(registry)) == ["one", "two", "worse"]
    assert [one.version for one in read_history(registry)] == ["one", "two", "one"]
    assert json.loads((registry / "live.json").read_bytes())["version"] == "one"


@pytest.mark.slow
def test_a_registry_on_s3(s3_place, make_bundle, rules):
    registry = locate(s3_place("registry"))
    for seed, name in enumerate(("one", "two")):
        add_version(registry, str(make_bundle(seed)), name)
        assert promote(registry, name, Reason(), rules).changed
    assert roll_back(registry, Reason(), rules).live.version == "one"
    assert [version.name for version in list_versions(registry)] == ["one", "two"]
    assert len(read_history(registry)) == 3
    found = load_bundle(version_folder(registry, "two").uri)
    assert found.path == str(registry / "versions" / "two")
