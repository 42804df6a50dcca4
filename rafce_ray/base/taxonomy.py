"""Emotions, action units and their names: RAF-CE's and the seed's lists, and the grammar of action-unit tokens.

The labels of a dataset are configuration (:class:`Taxonomy`); the lists here are its defaults.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

BASIC_EMOTIONS = ("surprised", "fearful", "disgusted", "happy", "sad", "angry")
"""The six basic emotions in the order of RAF-CE's ``distribution.txt``."""

RAFCE_EMOTIONS: dict[str, tuple[str, str]] = {
    "happily surprised": ("happy", "surprised"),
    "happily disgusted": ("happy", "disgusted"),
    "sadly fearful": ("sad", "fearful"),
    "sadly angry": ("sad", "angry"),
    "sadly surprised": ("sad", "surprised"),
    "sadly disgusted": ("sad", "disgusted"),
    "fearfully angry": ("fearful", "angry"),
    "fearfully surprised": ("fearful", "surprised"),
    "fearfully disgusted": ("fearful", "disgusted"),
    "angrily surprised": ("angry", "surprised"),
    "angrily disgusted": ("angry", "disgusted"),
    "disgustedly surprised": ("disgusted", "surprised"),
    "happily fearful": ("happy", "fearful"),
    "happily sad": ("happy", "sad"),
}
"""RAF-CE's fourteen classes in the order of their label (0-based), with the two basic emotions each is made of."""

SEED18 = (1, 2, 4, 5, 6, 7, 9, 10, 12, 15, 17, 20, 23, 24, 25, 26, 43, 45)
"""The eighteen action units of the seed's vocabulary. AU45 never occurs in RAF-CE."""

ACTION_UNIT_NAMES: dict[int, str] = {
    1: "Inner brow raiser",
    2: "Outer brow raiser",
    4: "Brow lowerer",
    5: "Upper lid raiser",
    6: "Cheek raiser",
    7: "Lid tightener",
    9: "Nose wrinkler",
    10: "Upper lip raiser",
    11: "Nasolabial deepener",
    12: "Lip corner puller",
    13: "Sharp lip puller",
    14: "Dimpler",
    15: "Lip corner depressor",
    16: "Lower lip depressor",
    17: "Chin raiser",
    18: "Lip pucker",
    19: "Tongue show",
    20: "Lip stretcher",
    21: "Neck tightener",
    22: "Lip funneler",
    23: "Lip tightener",
    24: "Lip pressor",
    25: "Lips part",
    26: "Jaw drop",
    27: "Mouth stretch",
    28: "Lip suck",
    29: "Jaw thrust",
    30: "Jaw sideways",
    31: "Jaw clencher",
    32: "Lip bite",
    33: "Cheek blow",
    34: "Cheek puff",
    35: "Cheek suck",
    36: "Tongue bulge",
    37: "Lip wipe",
    38: "Nostril dilator",
    39: "Nostril compressor",
    41: "Lid droop",
    42: "Slit",
    43: "Eyes closed",
    44: "Squint",
    45: "Blink",
    46: "Wink",
}
"""FACS names (Ekman, Friesen and Hager 2002) by action-unit number."""

UNKNOWN_WORDS = frozenset(
    ("nan", "na", "n/a", "n.a.", "#n/a", "<na>", "null", "nil", "?", "-", "--", "-1", "-9", "-99", "-999")
)
"""Words, as of :func:`label_key`, by which tables say that a label is unknown."""

PERHAPS_UNKNOWN_WORDS = frozenset(("none", "unknown", "undefined", "missing"))
"""Words that say in one table that a label is unknown, and name a class in another."""

_TOKEN = re.compile(r"^(?:AU|AD)?([LRTB]{0,2})(\d{1,2})([A-E]|[LR])?$", re.IGNORECASE)
_SEPARATORS = re.compile(r"[+,;|\s]+")


def parse_action_unit_token(token: str) -> int | None:
    """The base action unit that one token names, or None where the token cannot be read.

    Reads plain numbers, ``AU``/``AD`` prefixes, side letters (left, right, top, bottom; the base AU is present) and a
    trailing FACS intensity A-E or side: ``12``, ``L12``, ``BL18``, ``L12L``, ``AU4``, ``AD19``, ``25C``.
    """
    match = _TOKEN.match(token)
    if match is None:
        return None
    number = int(match.group(2))
    return number if number > 0 else None


def split_action_unit_tokens(text: str) -> list[str]:
    """The tokens of an action-unit label such as ``1+4+L12``; separators are ``+``, ``,``, ``;``, ``|`` and blanks."""
    return [token for token in _SEPARATORS.split(text.strip()) if token]


def action_unit_code(number: int) -> str:
    """``12`` -> ``"AU12"``."""
    return f"AU{number}"


@lru_cache(maxsize=10_000)
def label_key(text: str) -> str:
    """The normal form of a label's spellings.

    Letter case, Unicode form, invisible characters, blanks, hyphens between words, quotes around it and a number's
    leading zeros make no difference: ``"Happily-Surprised "`` and ``happily surprised``, ``01`` and ``1``.
    """
    visible = "".join(char for char in unicodedata.normalize("NFKC", text) if unicodedata.category(char) != "Cf")
    plain = unicodedata.normalize("NFKC", visible.casefold()).strip().strip("\"'`").strip()
    return re.sub(r"^0+(?=\d+$)", "", re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", plain))


def class_named(text: str, names: Sequence[str]) -> int:
    """The class with this name, or with another spelling of it if only one class has one; -1 where there is none."""
    if text in names:
        return names.index(text)
    keys = [label_key(name) for name in names]
    return keys.index(label_key(text)) if keys.count(label_key(text)) == 1 else -1


def emotion_components(name: str) -> tuple[str, str] | None:
    """The two basic emotions of one of RAF-CE's compound emotions by name; None for any other name."""
    return RAFCE_EMOTIONS.get(label_key(name))


@dataclass(frozen=True)
class Taxonomy:
    """The outputs of a model: ``emotions[i]`` is the class of label i, ``action_units[j]`` the AU of column j.

    Either tuple may be empty: that task is then not trained. ``components[i]`` has the two basic emotions of a compound
    class, None for another class.
    """

    emotions: tuple[str, ...]
    components: tuple[tuple[str, str] | None, ...]
    action_units: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.components) != len(self.emotions):
            raise ValueError(f"{len(self.components)} components for {len(self.emotions)} emotions: one each is needed")
        for what, values in (("emotion", self.emotions), ("action unit", self.action_units)):
            if len(set(values)) != len(values):
                raise ValueError(f"an {what} is listed twice in {list(values)}")

    @property
    def num_emotions(self) -> int:
        """Number of emotion classes E."""
        return len(self.emotions)

    @property
    def num_action_units(self) -> int:
        """Number of action units A."""
        return len(self.action_units)

    @property
    def action_unit_codes(self) -> tuple[str, ...]:
        """``("AU1", "AU2", ...)`` in column order."""
        return tuple(action_unit_code(number) for number in self.action_units)

    @property
    def basic_emotions(self) -> tuple[str, ...]:
        """The basic emotions that occur in ``components``: RAF-CE's order first, then any other by first use."""
        seen = [basic for pair in self.components if pair is not None for basic in pair]
        return tuple(dict.fromkeys([basic for basic in BASIC_EMOTIONS if basic in seen] + seen))


def make_taxonomy(emotions: tuple[str, ...], action_units: tuple[int, ...]) -> Taxonomy:
    """A taxonomy from names alone; compound classes known by RAF-CE's names get their components."""
    return Taxonomy(tuple(emotions), tuple(emotion_components(name) for name in emotions), tuple(action_units))
