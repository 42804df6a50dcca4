"""What is wrong with a configuration, said so that its author can mend it: works for any pydantic model of sections."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxtuple = 4, 20, 20, 20
_BRIEF.maxstring, _BRIEF.maxlong, _BRIEF.maxother = 120, 60, 120


def shown(value: Any) -> str:
    """A value for a message: on one line, and what is long is cut in the middle."""
    return _BRIEF.repr(value)


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """One line per fault of a pydantic validation: key, what was found, what was expected, the remedy."""
    reported: set[str] = set()
    for fault in error.errors():
        location = [str(part) for part in fault["loc"]]
        key, field = _known_part(location, model)
        if fault["type"] == "extra_forbidden":
            known = list(_dotted_keys(model))
            wanted = ".".join(location)
            yield f"{wanted}: unknown key{did_you_mean(wanted, known)}"
        elif not key:
            yield _message(fault)
        elif key not in reported:
            parts = key.split(".")
            alternatives = [one for one in error.errors() if [str(part) for part in one["loc"]][: len(parts)] == parts]
            # Our own messages say what was found, and mean the alternative that was tried.
            own = [one for one in alternatives if one["type"] == "value_error"]
            expected = "; or ".join(dict.fromkeys(_message(one) for one in own or alternatives))
            meaning = f" ({field})" if field else ""
            yield f"{key}: {expected}" if own else f"{key}: found {shown(fault['input'])}; {expected}{meaning}"
        reported.add(key)


def _message(fault: ErrorDetails) -> str:
    return fault["msg"].removeprefix("Value error, ")


def _known_part(location: list[str], model: type[BaseModel]) -> tuple[str, str | None]:
    """The leading part of a pydantic location that names configuration keys, and the description of its field."""
    known: list[str] = []
    description = None
    for part in location:
        field = model.model_fields.get(part)
        if field is None:
            break
        known.append(part)
        description = field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
        else:
            break
    return ".".join(known), description


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")


def did_you_mean(wanted: str, known: Sequence[str]) -> str:
    """``"; did you mean 'optim.lr'?"`` for the known key nearest to ``wanted``, or nothing where none is near."""
    parent, _, last = wanted.rpartition(".")
    siblings = [key for key in known if parent and key.rpartition(".")[0] == parent]
    near = (
        [key for key in siblings if key.startswith(wanted)]
        or difflib.get_close_matches(wanted, siblings, n=1, cutoff=0.85)
        or [key for key in known if key.rpartition(".")[2] == last]
        or difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    )
    return f"; did you mean {near[0]!r}?" if near else ""
