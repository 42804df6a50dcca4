"""The documents of a YAML file with the line of every value, and what is wrong at which of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from rafce_ray.errors import UsageError

Place = tuple[str | int, ...]
"""Keys and positions that lead from a document to a value in it."""


class Missing:
    """What is found where nothing is."""

    def __repr__(self) -> str:
        return "nothing"


MISSING = Missing()


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where, what was found and what was expected, both in words, and how to mend it."""

    place: Place
    found: str
    expected: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f" {self.remedy}" if self.remedy else ""
        end = "" if self.expected.endswith("?") else "."
        return f"{dotted(self.place)}: found {self.found}; expected {self.expected}{end}{remedy}"


@dataclass(frozen=True)
class Document:
    """One document: its plain values, the line of each (from 1), and keys that stand in it twice."""

    content: Any
    lines: Mapping[Place, int]
    repeated: tuple[Fault, ...] = ()
    blocks: Mapping[Place, int] = field(default_factory=dict)
    """Of each text in block style (``|``), the line on which it begins."""

    @property
    def kind(self) -> str:
        """The document's ``kind``; empty where it has none."""
        return str(self.content.get("kind", "")) if isinstance(self.content, dict) else ""

    @property
    def name(self) -> str:
        """``RayService rafce``, or what there is of it."""
        metadata = self.content.get("metadata") if isinstance(self.content, dict) else None
        return f"{self.kind} {metadata.get('name', '')}".strip() if isinstance(metadata, dict) else self.kind

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest one around it that is there."""
        while place not in self.lines:
            place = place[:-1]
        return self.lines[place]


def read_documents(text: str, file: str) -> list[Document]:
    """All documents of a YAML file that are not empty. UsageError, with the line, where it is not YAML."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    documents = []
    try:
        while loader.check_node():
            node = loader.get_node()
            if node is None:
                continue
            lines: dict[Place, int] = {}
            blocks: dict[Place, int] = {}
            repeated = tuple(_walk(node, (), lines, blocks, frozenset()))
            content = loader.construct_document(node)
            if content is not None:
                documents.append(Document(content, lines, repeated, blocks))
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    return documents


def _walk(
    node: yaml.Node, place: Place, lines: dict[Place, int], blocks: dict[Place, int], around: frozenset[int]
) -> Iterator[Fault]:
    """Fill ``lines`` and ``blocks``; yield every key that a mapping has twice, of which YAML would keep the last."""
    lines.setdefault(place, node.start_mark.line + 1)
    if id(node) in around:
        return
    around |= {id(node)}
    if isinstance(node, yaml.ScalarNode) and node.style == "|":
        blocks[place] = node.start_mark.line + 2
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*place, index), lines, blocks, around)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            here = (*place, str(key.value))
            lines[here] = key.start_mark.line + 1
            if key.value in seen:
                yield Fault(here, f"the key a second time (first on line {seen[key.value]})", "each key once")
            seen.setdefault(key.value, lines[here])
            yield from _walk(value, here, lines, blocks, around)


def dotted(place: Place) -> str:
    """``spec.workerGroupSpecs[0].groupName``."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif "." in part or "/" in part:
            text += f"[{part!r}]"
        else:
            text += f".{part}" if text else part
    return text or "the document"


def at(content: Any, *place: str | int) -> Any:
    """The value at a place; MISSING where there is none."""
    for part in place:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return MISSING
    return content
