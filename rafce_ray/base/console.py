"""Terminal output of all commands: messages on standard error, exit codes, JSON and progress bars."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TextIO

from rafce_ray.base.errors import Level, RafceError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    console: Console
    """Standard error: everything a program says to a person goes here; standard output carries results only."""


def __getattr__(name: str) -> Any:
    """``console``, made when it is first used: a usage is printed without Rich."""
    if name == "console":
        return _console()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


LEVEL_STYLES: dict[Level, str] = {
    "refusal": "bold red",
    "serious": "bold red",
    "error": "red",
    "warning": "bold yellow",
    "info": "bold",
}
"""How a finding's level is printed; the level is a word, colour only repeats it."""

_OF_A_PLACE = {
    getattr(errno, name) for name in ("EACCES", "EISDIR", "ELOOP", "ENAMETOOLONG", "ENOTDIR", "EPERM", "EROFS")
}
"""Errors of a place that a person named and that cannot be used as it is."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(name: str) -> str:
    """A file's or folder's name for a message: one line, with ``\\x1b`` for what a terminal would take as a command."""
    return _escaped(name).replace("\n", "\\n").replace("\t", "\\t")


def _escaped(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str) -> None:
    """One line to the person at the terminal."""
    _console().print(_escaped(text), markup=False)


def warn(text: str) -> None:
    """One line that the person should act on."""
    _print_marked("warning: ", "bold yellow", text)


def _print_marked(mark: str, style: str, text: str) -> None:
    from rich.text import Text

    _console().print(Text.assemble((mark, style), _escaped(text)))


MOST_COLUMNS = 10_000
"""Of a terminal; Rich would make lines of any length that ``COLUMNS`` says."""


def command(body: Callable[[list[str]], int]) -> Callable[..., int]:
    """A program's ``main``, which takes the process's arguments unless it is given some.

    It turns errors into messages and exit codes: 0 done, 1 failed, 2 usage, 3 failed a gate.
    """

    @wraps(body)
    def main(argv: list[str] | None = None) -> int:
        return _run_main(body, argv)

    return main


def _run_main(main: Callable[[list[str]], int], argv: list[str] | None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    if os.environ.get("COLUMNS", "").isdigit() and int(os.environ["COLUMNS"]) > MOST_COLUMNS:
        os.environ["COLUMNS"] = str(MOST_COLUMNS)
        _console().width = MOST_COLUMNS
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a letter gets its code.
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except RafceError as error:
        return _failed(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader of standard output went away: keep the interpreter from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        kind = UsageError if error.errno in _OF_A_PLACE else RafceError
        return _failed(_of_the_system(error), kind.exit_code)
    except UnicodeEncodeError as error:
        # So Python shows bytes of names that are not UTF-8.
        if not any("\udc80" <= letter <= "\udcff" for letter in error.object):
            raise
        text = f"{printable(error.object)}: its name is not UTF-8. Give a place whose name is, or rename it."
        return _failed(text, UsageError.exit_code)
    except KeyboardInterrupt:
        say("stopped.")
        return 130


def _failed(text: str, exit_code: int) -> int:
    """Say why a command failed; its exit code."""
    _print_marked("error: ", "bold red", text)
    return exit_code


@contextmanager
def handled_signals(handler: Callable[[int, Any], None], numbers: Iterable[int]) -> Iterator[None]:
    """``handler`` takes these signals while the block lasts; ValueError outside of the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _of_the_system(error: OSError) -> str:
    """The operating system's reason, the place, and a remedy."""
    place = f"{error.filename}: " if error.filename is not None else ""
    # Pyarrow's own words name the place.
    reason = (error.strerror or str(error)).strip().splitlines()[0].rstrip(".")
    if error.errno in _OF_A_PLACE:
        remedy = "Give another place, or one that may be used."
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "Free some space, then give the same command again."
    else:
        remedy = "Give the same command again once that is fixed."
    return f"{place}{reason}. {remedy}"


def print_json(record: dict[str, Any]) -> None:
    """One JSON object as one line on standard output; NaN and infinities become null."""
    write_json_line(sys.stdout, record)
    sys.stdout.flush()


def write_json_line(stream: TextIO, record: Any) -> None:
    """One JSON object as one line; its letters are escaped where the stream's encoding may lack them."""
    text = to_json(record)
    if not (stream.encoding or "utf-8").lower().startswith("utf"):
        text = json.dumps(json.loads(text))
    stream.write(text + "\n")


def to_json(record: Any) -> str:
    """JSON without NaN: what is unknown is null."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False)


def pretty_json(record: Any) -> bytes:
    """A JSON file that people read, one value a line; what is unknown is null."""
    return (json.dumps(finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity in it replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


RATE_KNOWN_S = 1.0
"""Seconds after which a progress without a bar shows its rate."""


@contextmanager
def progress_bar(description: str, total: int | None, *, rate_over_s: float = 30.0) -> Iterator[Callable[[int], None]]:
    """A bar with count, rate and time left; yields ``advance(n)``. Outside of a terminal it prints a line per tenth.

    The bar's rate is that of the last ``rate_over_s`` seconds, in which ``advance`` should be called several times.
    """
    if not _console().is_terminal:
        yield _plain_progress(description, total)
        return
    from rich import progress as bars
    from rich.text import Text

    class Rate(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f}/s")

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        Rate(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=_console(), speed_estimate_period=rate_over_s) as progress:
        task = progress.add_task(description, total=total)
        yield lambda n: progress.advance(task, n)


def _plain_progress(description: str, total: int | None) -> Callable[[int], None]:
    done, began = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done
        before, done = done, done + n
        if total and (before * 10 // total) != (done * 10 // total):
            took = time.monotonic() - began
            rate = done / max(took, 1e-9)
            left = timedelta(seconds=round((total - done) / rate))
            # The first items of several processes come at once: no rate, yet.
            known = f", {rate:,.1f}/s, {left} left" if took >= RATE_KNOWN_S or done == total else ""
            say(f"{description}: {done}/{total}{known}")

    return advance
