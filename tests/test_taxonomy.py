import pytest

from rafce_ray.base.taxonomy import (
    ACTION_UNIT_NAMES,
    RAFCE_EMOTIONS,
    SEED18,
    Taxonomy,
    make_taxonomy,
    parse_action_unit_token,
    split_action_unit_tokens,
)


@pytest.mark.parametrize(
    ("token", "number"),
    [
        ("1", 1),
        ("25", 25),
        ("L12", 12),
        ("R12", 12),
        ("B22", 22),
        ("T24", 24),
        ("t23", 23),
        ("AD19", 19),
        ("BL18", 18),
        ("RB18", 18),
        ("L12L", 12),
        ("12C", 12),
        ("AU4", 4),
        ("au43", 43),
    ],
)
def test_every_token_shape_of_raf_ce_and_facs_is_read(token, number):
    assert parse_action_unit_token(token) == number


@pytest.mark.parametrize("token", ["", "AU", "x12", "123", "12F", "LRT12", "null", "0", "-4", "1.0", "AU 4"])
def test_what_is_no_token_is_not_read(token):
    assert parse_action_unit_token(token) is None


def test_the_separators_of_raf_ce_and_of_the_seed():
    assert split_action_unit_tokens("1+4+L12") == ["1", "4", "L12"]
    assert split_action_unit_tokens(" AU1 AU2,AU4 ") == ["AU1", "AU2", "AU4"]
    assert split_action_unit_tokens("  ") == []


def test_the_seeds_parser_reads_nothing_of_raf_ces_format_and_ours_reads_all():
    seed_codes = {f"AU{number}" for number in SEED18}
    label = "1+4+25"
    assert [token for token in label.split() if token in seed_codes] == []
    assert [parse_action_unit_token(token) for token in split_action_unit_tokens(label)] == [1, 4, 25]


def test_the_lists_agree_with_one_another():
    assert len(RAFCE_EMOTIONS) == 14
    assert list(RAFCE_EMOTIONS)[5] == "sadly disgusted"
    assert set(SEED18) <= set(ACTION_UNIT_NAMES)
    assert len(SEED18) == 18


def test_components_follow_names_and_only_known_ones():
    taxonomy = make_taxonomy(("happily surprised", "neutral"), (12,))
    assert taxonomy.components == (("happy", "surprised"), None)
    assert taxonomy.basic_emotions == ("surprised", "happy")
    assert taxonomy.action_unit_codes == ("AU12",)


def test_a_name_listed_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Taxonomy(("a", "a"), (None, None), ())
