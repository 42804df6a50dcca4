from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from rafce_drawing.labelled import (
    ODD_ACTIONS,
    action_unit_rates,
    component_indices,
    draw_label,
    draw_votes,
    num_extras,
    plan_labels,
    prototypes,
    split_counts,
    synthesize,
)
from rafce_drawing.paint import draw_face
from rafce_drawing.shape import HAIR_STYLES, Action, Person, Scene, sample_person, sample_scene
from rafce_ray.base.errors import UsageError
from rafce_ray.base.taxonomy import parse_action_unit_token

LABEL_FILES = ("RAFCE_emolabel.txt", "RAFCE_partition.txt", "RAFCE_AUlabel.txt", "distribution.txt")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("drawn") / "faces", 70, seed=3, processes=1).root


@pytest.fixture(scope="module")
def sitter() -> tuple[Person, Scene]:
    rng = np.random.default_rng(20)
    person = dataclasses.replace(
        sample_person(rng), hair_style="bald", beard_strength=0.0, moustache_strength=0.0, freckles=0.0, age=0.3
    )
    plain = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "zoom": 1.0, "shift": (0.0, 0.0), "contrast": 1.0, "exposure": 1.0}
    nothing_on = {"glasses": "none", "hat": "none", "occluder": "none", "blur_px": 0.0, "noise": 0.0}
    return person, dataclasses.replace(sample_scene(rng), **plain, **nothing_on, light=(0.0, -0.4, 0.917), ambient=0.45)


def rows(root: Path, name: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in (root / name).read_text("ascii").split("\n"))


def changed(sitter: tuple[Person, Scene], *actions: Action) -> np.ndarray:
    """Absolute change per pixel (100, 100) against the same face at rest."""
    person, scene = sitter
    before, after = (draw_face(acting, person, scene).astype(int) for acting in ((), actions))
    return np.abs(after - before).max(2)


def test_full_size_has_the_counts_of_rafce() -> None:
    plan = plan_labels(4549, np.random.default_rng(0))
    labelled = plan.emotion >= 0
    assert len(plan.emotion) == 4908
    assert np.bincount(plan.split[labelled]).tolist() == [2709, 909, 931]
    assert np.bincount(plan.emotion[plan.split == 0]).tolist() == [
        394, 171, 109, 136, 71, 495, 120, 352, 24, 124, 582, 108, 6, 17,
    ]  # fmt: skip
    assert np.bincount(plan.emotion[plan.split == 1]).tolist()[12:] == [1, 8]
    assert np.bincount(plan.emotion[plan.is_null], minlength=14).tolist() == [
        14, 11, 10, 18, 15, 61, 1, 20, 1, 4, 85, 9, 0, 2,
    ]  # fmt: skip
    assert np.bincount(plan.split[plan.is_null]).tolist() == [136, 65, 50]
    assert sorted(plan.odd_token[plan.odd_token >= 0].tolist()) == [0, 1, 2, 3, 4]
    assert not plan.is_null[plan.odd_token >= 0].any()


@pytest.mark.parametrize("num_images", [1, 5, 14, 20, 100, 333, 9098, 100_000])
def test_other_sizes_are_in_proportion_with_every_class_in_train(num_images: int) -> None:
    counts = split_counts(num_images)
    assert counts.sum() == num_images
    assert counts.min() >= 0
    if num_images >= 14:
        assert counts[:, 0].min() >= 1
    if num_images == 9098:
        assert (counts == 2 * split_counts(4549)).all()
    plan = plan_labels(min(num_images, 400), np.random.default_rng(1))
    assert (plan.emotion >= 0).sum() == min(num_images, 400)


def test_rates_follow_the_table_within_an_action_unit_and_rafce_in_total() -> None:
    table, rates = prototypes(), action_unit_rates()
    weights = split_counts(4549).sum(1) - np.array([14, 11, 10, 18, 15, 61, 1, 20, 1, 4, 85, 9, 0, 2])
    total = dict(zip(table.action_units, weights @ rates / weights.sum(), strict=True))
    assert total[25] == pytest.approx(1661 / 2573, abs=1e-4)
    assert total[16] == pytest.approx(426 / 2573, abs=1e-4)
    assert 45 not in total
    smile = rates[:, table.action_units.index(12)]
    assert set(np.argsort(smile)[-4:].tolist()) == {0, 1, 12, 13}


def test_labels_have_the_shapes_and_noise_of_rafce() -> None:
    rng = np.random.default_rng(0)
    counts, again, named, sizes, shapes = split_counts(1500).sum(1), 0, 0, [], Counter[str]()
    for emotion in np.repeat(np.arange(14), counts):
        label = draw_label(int(emotion), -1, rng)
        pair = set(component_indices()[emotion])
        assert label.votes.sum() == pytest.approx(1.0)
        named += set(np.argsort(label.votes)[-2:].tolist()) == pair
        again += set(np.argsort(rng.multinomial(29, label.votes) + 0.01 * rng.random(6))[-2:].tolist()) == pair
        sizes.append(len(label.tokens))
        shapes.update(re.sub(r"\d+", "", token) for token in label.tokens)
    assert named / 1500 == pytest.approx(0.985, abs=0.012)
    assert again / 1500 == pytest.approx(0.86, abs=0.035)
    assert np.mean(sizes) == pytest.approx(3.8, abs=0.2)
    assert max(sizes) <= 11
    assert min(sizes) >= 1
    assert set(shapes) == {"", "L", "R", "T", "B"}
    assert shapes[""] / sum(shapes.values()) == pytest.approx(0.951, abs=0.012)


def test_votes_of_a_rare_class_are_the_least_certain() -> None:
    rng = np.random.default_rng(1)
    leads = {}
    for emotion in (8, 10):
        pair = list(component_indices()[emotion])
        votes = [draw_votes(emotion, rng) for _ in range(150)]
        leads[emotion] = np.mean([vote[pair].min() - np.delete(vote, pair).max() for vote in votes])
    assert leads[8] < 0.5 * leads[10]


@pytest.mark.parametrize("index", range(len(ODD_ACTIONS)))
def test_an_odd_token_is_written_as_it_is_and_drawn_as_it_is_meant(index: int) -> None:
    token, meant = list(ODD_ACTIONS.items())[index]
    label = draw_label(5, index, np.random.default_rng(index))
    assert label.tokens.count(token) == 1
    assert meant in label.actions
    assert parse_action_unit_token(token) == meant.action_unit


def test_files_are_in_the_exact_format(drawn: Path) -> None:
    extras = num_extras(70)
    names = sorted(path.name for path in (drawn / "aligned").iterdir())
    assert names == [f"{number:04d}_aligned.jpg" for number in range(1, 71 + extras)]
    expected = {
        "RAFCE_emolabel.txt": r"\d{4}\.jpg ([0-9]|1[0-3])",
        "RAFCE_partition.txt": r"\d{4}\.jpg [012]",
        "RAFCE_AUlabel.txt": r"\d{4}\.jpg (null|[A-Za-z]{0,2}\d{1,2}L?(\+[A-Za-z]{0,2}\d{1,2}L?)*)",
        "distribution.txt": r"\d{4}\.jpg [0-9.e-]+( [0-9.e-]+){5}",
    }
    for name, line in expected.items():
        content = (drawn / name).read_bytes().decode("ascii")
        assert re.fullmatch(rf"({line}\n){{69}}{line}", content), name
    stems = {name: list(rows(drawn, name)) for name in LABEL_FILES}
    assert all(stem == sorted(stem) for stem in stems.values())
    assert len({tuple(stem) for stem in stems.values()}) == 1
    for vote in rows(drawn, "distribution.txt").values():
        assert sum(map(float, vote.split())) == pytest.approx(1.0, abs=1e-4)
    for path in (drawn / "aligned").iterdir():
        assert cv2.imread(str(path)).shape == (100, 100, 3)


def test_every_label_file_row_agrees_with_the_summary(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = synthesize(
        tmp_path / "new" / "faces", 20, processes=1, progress=lambda done, of: calls.append((done, of))
    )
    codes = Counter(rows(summary.root, "RAFCE_partition.txt").values())
    assert summary.per_split == {"train": codes["0"], "test": codes["1"], "validation": codes["2"]}
    assert (summary.num_labelled, summary.num_extras) == (20, 2)
    assert calls[-1] == (22, 22)
    assert set(rows(summary.root, "RAFCE_emolabel.txt").values()) == {str(emotion) for emotion in range(14)}


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_one(drawn: Path, tmp_path: Path) -> None:
    twin = synthesize(tmp_path / "twin", 70, seed=3, processes=2).root
    for path in drawn.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (twin / path.relative_to(drawn)).read_bytes(), path.name


def test_another_seed_draws_other_faces(drawn: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "other", 14, seed=4, processes=1).root
    assert (other / "aligned/0001_aligned.jpg").read_bytes() != (drawn / "aligned/0001_aligned.jpg").read_bytes()


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UsageError, match="name a new folder"):
        synthesize(tmp_path, 14)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize("bad", [{"num_images": 0}, {"seed": -1}, {"processes": 0}])
def test_arguments_out_of_range_are_refused(bad: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected"):
        synthesize(tmp_path / "faces", **({"num_images": 14} | bad))


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "faces", 14, processes=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# Where an AU shows first: rows and columns of the aligned image.
REGIONS = {
    1: (8, 42, 30, 70), 2: (8, 42, 12, 88), 4: (22, 44, 30, 70), 5: (33, 48, 22, 78), 6: (36, 66, 12, 88),
    7: (33, 50, 22, 78), 9: (34, 70, 36, 64), 10: (58, 86, 30, 70), 11: (58, 76, 30, 70), 12: (60, 90, 22, 78),
    13: (60, 90, 30, 70), 14: (70, 88, 26, 74), 15: (70, 94, 28, 72), 16: (72, 96, 34, 66), 17: (70, 100, 34, 66),
    18: (68, 92, 32, 68), 20: (68, 90, 24, 76), 22: (68, 92, 34, 66), 23: (68, 90, 34, 66), 24: (68, 92, 34, 66),
    25: (70, 92, 34, 66), 26: (70, 100, 15, 85), 27: (66, 100, 12, 88), 28: (68, 92, 34, 66), 38: (60, 70, 40, 60),
    43: (33, 50, 20, 80),
}  # fmt: skip


@pytest.mark.parametrize("action_unit", REGIONS)
def test_an_action_unit_moves_its_own_part_of_the_face(action_unit: int, sitter: tuple[Person, Scene]) -> None:
    change = changed(sitter, Action(action_unit, 0.9))
    top, bottom, left, right = REGIONS[action_unit]
    inside = np.zeros(change.shape, bool)
    inside[top:bottom, left:right] = True
    assert change[inside].max() > 40
    assert change[~inside].mean() < 0.25 * change[inside].mean()


@pytest.mark.parametrize("action_unit", [1, 2, 10, 12, 14, 15])
def test_left_and_right_are_the_persons_own(action_unit: int, sitter: tuple[Person, Scene]) -> None:
    left, right = (changed(sitter, Action(action_unit, 0.9, side)) for side in "LR")
    assert left[:, 55:].mean() > 3 * left[:, :45].mean()
    assert right[:, :45].mean() > 3 * right[:, 55:].mean()


def test_top_and_bottom_are_the_lips(sitter: tuple[Person, Scene]) -> None:
    top, bottom = (changed(sitter, Action(24, 0.9, lip))[66:96, 38:62].mean(1) for lip in "TB")
    centre = np.arange(len(top))
    assert (top * centre).sum() / top.sum() < (bottom * centre).sum() / bottom.sum() - 2


@pytest.mark.parametrize("action_unit", [1, 4, 12, 15, 26])
def test_a_stronger_action_moves_more(action_unit: int, sitter: tuple[Person, Scene]) -> None:
    weak, strong = (changed(sitter, Action(action_unit, intensity)).mean() for intensity in (0.3, 0.9))
    assert weak < 0.7 * strong


@pytest.mark.slow
def test_appearance_is_independent_of_the_label() -> None:
    plan = plan_labels(4549, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    num_faces = len(plan.emotion)
    people, scenes = zip(*((sample_person(rng), sample_scene(rng)) for _ in range(num_faces)), strict=True)
    numbers = {
        "skin": [person.skin[0] for person in people],
        "age": [person.age for person in people],
        "bald": [float(person.hair_style == HAIR_STYLES[0]) for person in people],
        "light": [scene.light[0] for scene in scenes],
        "quality": [scene.jpeg_quality for scene in scenes],
        "file number": list(range(num_faces)),
    }
    classes = [np.flatnonzero(plan.emotion == emotion) for emotion in range(14)]
    for name, values in numbers.items():
        z = (np.array(values) - np.mean(values)) / np.std(values)
        between = sum(len(members) * z[members].mean() ** 2 for members in classes)
        assert between < 36.1, name  # chi-square with 14 degrees of freedom, p = 0.001


def test_the_same_index_looks_alike_whatever_it_shows() -> None:
    """The surroundings of a file come from its number alone: planning other labels leaves its corners as they were."""
    rng = np.random.default_rng(5)
    person, scene = dataclasses.replace(sample_person(rng), hair_style="bald"), sample_scene(rng)
    scene = dataclasses.replace(scene, occluder="none", hat="none")
    first = draw_face([Action(12, 0.9), Action(6, 0.9), Action(25, 0.8)], person, scene)
    second = draw_face([Action(4, 0.9), Action(15, 0.9), Action(17, 0.8)], person, scene)
    corners = np.s_[[0, 0, 99, 99], [0, 99, 0, 99]]
    np.testing.assert_array_equal(first[corners], second[corners])
    assert (first != second).mean() > 0.05
