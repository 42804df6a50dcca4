"""The titles of a label table's columns, as labs and programs write them: names, splits, emotions, action units."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rafce_ray.config import DataConfig
from rafce_ray.data.records import Evidence, Finding, Level
from rafce_ray.errors import UsageError
from rafce_ray.taxonomy import ACTION_UNIT_NAMES, action_unit_code, parse_action_unit_token

_NAME = re.compile(r"(file|image|img|picture|photo)(_?(name|file|filename|path))?|path|input")
_SPLIT = re.compile(r"(data_|dataset_)split|split_name|set|subset|partition|usage")
_EMOTION = re.compile(r"emotions|(emotion|expression)_(label|class|name)|(facial_)?expression|compound_emotion")
_MAYBE_EMOTION = re.compile(r"labels?|class(_name)?|category|target")
"""Titles that are read as emotions only where a table has no action units: next to them, they could mean anything."""

_ACTION_UNIT_LIST = re.compile(r"action_?units?|aus|au_?(list|labels?|codes?)|facs(_(aus|codes?))?")
_PERSON = re.compile(r"(person|subject|participant|identity|actor)(_?(id|name))?")

_PRESENCE = frozenset(["c", "present", "presence", "occurrence", "occ", "binary", "active", "label"])
"""What may follow an action unit in the title of a column of 1 and 0; ``_c`` is OpenFace's."""

_INTENSITY = frozenset(["r", "intensity"])
"""What may follow it in the title of a column of intensities; ``_r`` is OpenFace's."""

_PLAIN_ACTION_UNIT = re.compile(r"^A[UD]_?[LRTB]{0,2}\d{1,2}$", re.IGNORECASE)
_ACTION_UNIT = re.compile(r"^(?:facs_)?(a[ud]_?[lrtb]{0,2}\d{1,2})(?:_(\w+))?$")
_MENTIONED = re.compile(r"(?:^|_)(?:(?:f|is|has)?a[ud]_?(?:[lrtb]{0,2}|[a-z]+_)|facs_?)0*(\d{1,2})(?!\d)")
_ABOUT = re.compile(r"(^|_)(aus|facs|action_?units?)(_|$)|^au$")
_NOT_LABELS = re.compile(
    r"(^|_)(coders?|raters?|annotators?|notes?|comments?|date|version|num|number|count|total)(_|$)"
)
"""Words of titles that tell of the coding of action units, not of the units."""

_ENDINGS = re.compile(r"(?:ers?|e|r|s)$")


@dataclass(frozen=True)
class Columns:
    """Positions of the columns that are read, and what there is to say of the titles.

    ``action_units`` maps a number to its position, ``action_unit_list`` is a column such as ``1+4+12``. ``presence``:
    action units whose title says that they are 1 or 0, not intensities. ``person`` names the person, which is no label;
    splits can go by it. ``read_as``: the titles of what is read, where they differ from its own.
    """

    header: tuple[str, ...]
    name: int
    split: int | None
    emotion: int | None
    action_units: dict[int, int]
    presence: frozenset[int]
    action_unit_list: int | None
    person: int | None
    read_as: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def read(self) -> set[int]:
        """Positions of all that are read."""
        given = (self.name, self.split, self.emotion, self.action_unit_list, *self.action_units.values())
        return {position for position in given if position is not None}

    @property
    def has_action_units(self) -> bool:
        """Whether any column holds action units."""
        return bool(self.action_units) or self.action_unit_list is not None


def title_key(title: str) -> str:
    """A title in lower case with one ``_`` for whatever stands between its words: ``" AU01_c"`` -> ``"au01_c"``."""
    text = unicodedata.normalize("NFKC", title).replace("\N{ZERO WIDTH NO-BREAK SPACE}", "")
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", text)
    return re.sub(r"action_?unit_?(?=\d)", "au", re.sub(r"[\W_]+", "_", text).strip("_").lower())


def find_name(header: Sequence[str], place: str) -> int | None:
    """The column of image file names: ``name``, or the only one of another usual title; None where there is none.

    Raises:
        UsageError: two columns could be meant.
    """
    return _find_one(header, [title_key(title) for title in header], place, "name", _NAME, "the image file names")


def find_columns(header: Sequence[str], place: str, file: str, data: DataConfig) -> Columns:
    """Which column is which. ``place`` and ``file`` are what messages call the table.

    Raises:
        UsageError: there are no names or no labels, or two columns could mean the same.
    """
    titles = [title.strip().strip("\N{ZERO WIDTH NO-BREAK SPACE}").strip() for title in header]
    keys = [title_key(title) for title in titles]
    units = _find_action_units(titles, keys, place, use_intensities=data.au_threshold is not None)
    lists = [position for position, key in enumerate(keys) if _ACTION_UNIT_LIST.fullmatch(key)]
    if len(lists) > 1 and not units.read and data.action_units != "none":
        raise _ambiguous(f"{place}:1", titles, lists, "the action units", "action_units")
    action_unit_list = lists[0] if lists and not units.read else None
    has_units = bool(units.read) or action_unit_list is not None
    name = find_name(titles, f"{place}:1")
    if name is None:
        raise UsageError(
            f"{place}:1: no column 'name' among {titles}. It holds the image file names; the titles filename, file, "
            "path and image are also read. Rename the column."
        )
    split = _find_one(titles, keys, f"{place}:1", "split", _SPLIT, "the split")
    emotion = None
    if "emotion" in keys or data.emotions != "none":
        emotion = _find_one(titles, keys, f"{place}:1", "emotion", _EMOTION, "the emotions")
        if emotion is None and not has_units:
            emotion = _find_one(titles, keys, f"{place}:1", "emotion", _MAYBE_EMOTION, "the emotions")
    read = {name, split, emotion, action_unit_list, *units.read.values()}
    others = [position for position in range(len(titles)) if position not in read]
    unread = _unread_action_units(titles, keys, others, units, lists)
    findings = []
    if unread:
        findings.append(_unread_finding(titles, unread, file, has_units=has_units, wanted=data.action_units != "none"))
    perhaps = [position for position in others if _MAYBE_EMOTION.fullmatch(keys[position])]
    if emotion is None and perhaps and data.emotions != "none":
        named = ", ".join(repr(titles[position]) for position in perhaps)
        message = f"{file}: {named} may hold emotions, which are not read"
        remedy = (
            f"Rename it to 'emotion' if it does: {titles[perhaps[0]]!r} is too general a title next to action units."
        )
        findings.append(Finding("warning", "unread_emotions", message, remedy, len(perhaps)))
    if emotion is None and not has_units:
        hint = "".join(f" {finding.message}. {finding.remedy}" for finding in findings)
        raise UsageError(f"{place}:1: neither a column 'emotion' nor AU columns such as 'AU12' among {titles}.{hint}")
    read_as = {
        what: titles[position]
        for what, position in (("name", name), ("split", split), ("emotion", emotion))
        if position is not None and keys[position] != what
    }
    for number, position in units.read.items():
        if not _PLAIN_ACTION_UNIT.match(titles[position]):
            read_as[action_unit_code(number)] = titles[position]
    if action_unit_list is not None:
        read_as["a list of action units"] = titles[action_unit_list]
    if read_as:
        listed = ", ".join(f"{title!r} is read as {what}" for what, title in read_as.items())
        findings.append(Finding("info", "titles_read", f"{file}: {listed}", "", len(read_as)))
    ignored = [titles[position] for position in others if position not in unread]
    if ignored:
        columns = (
            "1 column is no label and is" if len(ignored) == 1 else f"{len(ignored)} columns are no labels and are"
        )
        message = f"{file}: {columns} not read: {', '.join(ignored)}"
        findings.append(Finding("info", "ignored_columns", message, "", len(ignored)))
    return Columns(
        header=tuple(titles),
        name=name,
        split=split,
        emotion=emotion,
        action_units=units.read,
        presence=units.presence,
        action_unit_list=action_unit_list,
        person=next((position for position in others if _PERSON.fullmatch(keys[position])), None),
        read_as=read_as,
        findings=tuple(findings),
    )


@dataclass(frozen=True)
class _ActionUnitColumns:
    """Positions by action unit: ``read``; ``intensities``, read or not. ``presence``: read ones that are 1 or 0."""

    read: dict[int, int]
    intensities: dict[int, int]
    presence: frozenset[int]


def _find_action_units(
    titles: Sequence[str], keys: Sequence[str], place: str, *, use_intensities: bool
) -> _ActionUnitColumns:
    """Of an action unit's presence and its intensity, both of which OpenFace writes, one is read."""
    presence: dict[int, int] = {}
    intensities: dict[int, int] = {}
    said_to_be_presence = set()
    for position, key in enumerate(keys):
        match = _ACTION_UNIT.match(key)
        number = parse_action_unit_token(match.group(1).replace("_", "")) if match else None
        if match is None or number is None:
            continue
        kind = match.group(2)
        if kind == "r" and (not titles[position].rstrip(")]").endswith("r") or f"{match.group(1)}_l" in keys):
            # AU1_R next to AU1_L, or alone in capitals: the right side of a face.
            continue
        if kind is not None and kind not in _PRESENCE | _INTENSITY and _facs_number(kind) != number:
            continue
        columns = intensities if kind in _INTENSITY else presence
        if number in columns:
            both = f"{titles[columns[number]]!r} and {titles[position]!r}"
            raise UsageError(f"{place}:1: the columns {both} both say {action_unit_code(number)}. Keep one.")
        columns[number] = position
        if kind in _PRESENCE:
            said_to_be_presence.add(number)
    read = presence | intensities if use_intensities else dict(presence)
    order = sorted(read, key=lambda number: read[number])
    return _ActionUnitColumns(
        read={number: read[number] for number in order},
        intensities=intensities,
        presence=frozenset(number for number in said_to_be_presence if read[number] == presence[number]),
    )


def _find_one(
    titles: Sequence[str], keys: Sequence[str], place: str, title: str, others: re.Pattern[str], what: str
) -> int | None:
    """The column of the very title, or the only one of another title for it."""
    exact = [position for position, key in enumerate(keys) if key == title]
    found = exact or [position for position, key in enumerate(keys) if others.fullmatch(key)]
    if len(found) > 1:
        raise _ambiguous(place, titles, found, what, title)
    return found[0] if found else None


def _ambiguous(place: str, titles: Sequence[str], found: Sequence[int], what: str, title: str) -> UsageError:
    named = " and ".join(repr(titles[position]) for position in found)
    return UsageError(
        f"{place}: the columns {named} could each hold {what}. Keep one, or rename the one that is meant to {title!r} "
        "and the others to something else."
    )


def _unread_action_units(
    titles: Sequence[str], keys: Sequence[str], others: Sequence[int], units: _ActionUnitColumns, lists: Sequence[int]
) -> dict[int, str]:
    """Columns that look like action units and are not read: what to do about each, by its position."""
    unread = {}
    already = {action_unit_code(number) for number in units.read}
    numbered = [position for position in others if keys[position].isdecimal()]
    for position in others:
        key = keys[position]
        match = _ACTION_UNIT.match(key)
        number = parse_action_unit_token(match.group(1).replace("_", "")) if match else None
        if number in units.read and match is not None and match.group(2) in _PRESENCE | _INTENSITY | {None}:
            continue
        if position in units.intensities.values():
            unread[position] = f"{titles[position]!r} holds intensities: set data.au_threshold (usual: 2 of 0 to 5)"
        elif position in lists:
            unread[position] = f"{titles[position]!r} is a list, next to columns that are read: keep one of both"
        elif (title := _suggested_title(key, numbered=len(numbered) > 1)) is None or title in already:
            continue
        elif match is not None and match.group(2) in ("l", "r"):
            unread[position] = f"{titles[position]!r} looks like a side: write {title!r}, 1 where either side shows it"
        elif "+" in titles[position]:
            unread[position] = f"give each action unit of {titles[position]!r} a column of its own"
        else:
            unread[position] = f"rename {titles[position]!r} to {title!r}"
    return unread


def _unread_finding(
    titles: Sequence[str], unread: dict[int, str], file: str, *, has_units: bool, wanted: bool
) -> Finding:
    level: Level = "info" if not wanted else "warning" if has_units else "error"
    named = ", ".join(repr(titles[position]) for position in unread)
    columns = "1 column looks" if len(unread) == 1 else f"{len(unread)} columns look"
    message = f"{file}: {columns} like action units and {'is' if len(unread) == 1 else 'are'} not read: {named}"
    if not has_units:
        message += "; no action unit is read"
    advice = "; ".join(unread.values())
    remedy = f"{advice[0].upper()}{advice[1:]}. A column 'AU12' holds 1, 0 or blank, a column 'action_units' 1+4+12."
    evidence = tuple(Evidence(text, file, 1) for text in unread.values())
    return Finding(level, "unread_action_units", message, remedy, len(unread), evidence)


def _suggested_title(key: str, *, numbered: bool) -> str | None:
    """The title under which a column would be read that looks like action units; None where it does not look so."""
    if _NOT_LABELS.search(key):
        return None
    mentioned = {int(text) for text in _MENTIONED.findall(key)} - {0}
    if key.isdecimal() and numbered and int(key) in ACTION_UNIT_NAMES:
        mentioned = {int(key)}
    named = _facs_number(key)
    if named is not None:
        mentioned = {named}
    if mentioned:
        return action_unit_code(min(mentioned))
    return "action_units" if _ABOUT.search(key) else None


def _facs_number(key: str) -> int | None:
    """The action unit whose FACS name, or a form of it, is in a title: ``lip_corner_puller``, ``inner_brow_raise``."""
    words = _stems(key)
    for number, name in ACTION_UNIT_NAMES.items():
        wanted = _stems(title_key(name))
        found = any(words[start : start + len(wanted)] == wanted for start in range(len(words)))
        if found and (len(wanted) > 1 or len(words) == 1):
            return number
    return None


def _stems(key: str) -> list[str]:
    return [_ENDINGS.sub("", word) for word in key.split("_")]
