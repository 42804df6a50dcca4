"""Every command that a page shows is run, in the order of the pages, or says why not; what a page shows of an output is
what is printed.

A fenced block whose info string begins with ``sh`` holds commands. What follows says what becomes of them:

* nothing: bash runs them in the walk's folder; ``exits 3``: so, and that is the exit code;
* ``server``: they run until the walk ends, once they have printed their address;
* ``cluster``, ``long``, ``checkout``: they are not run, and the text before the block says why (``NOT_RUN``);
* paths of tests: these run the same commands on what they have.

A block ``json output`` or ``text output`` shows what the commands before it print: of JSON the keys and types count, of
text all words; numbers may be others, and ``...`` stands for anything. An output before the first command of a page is
held against all that the page prints.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from matplotlib import cbook
from serving import free_port

from rafce_ray.cli import VERBS
from rafce_ray.cli import main as rafce

REPOSITORY = Path(__file__).parents[1]
GUIDES = ("README.md", *(f"docs/{name}.md" for name in ("train", "tune", "serve", "operate", "troubleshooting")))
"""Walked through in this order, in one folder: a page may use what an earlier one made."""

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *REPOSITORY.glob("docs/**/*.md"),
]

NOT_RUN = {"cluster": "needs a cluster", "long": "not run by the tests", "checkout": "in a checkout"}
"""Kind of a block that is not run -> words that stand in the text before it."""

BLOCK = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\.venv/bin/)?(?:rafce|python|make|curl|ray|serve|kubectl|tensorboard) ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: ``words`` of its info string, ``before`` the text between the block before and it."""

    place: str
    words: tuple[str, ...]
    text: str
    before: str

    @property
    def is_command(self) -> bool:
        return self.words[:1] == ("sh",)

    @property
    def is_output(self) -> bool:
        return self.words[1:2] == ("output",)

    @property
    def is_run(self) -> bool:
        return self.is_command and (self.words[1:] in ((), ("server",)) or self.words[1] == "exits")


def blocks(page: Path) -> list[Block]:
    text, end, found = page.read_text(), 0, []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        place = f"{page.relative_to(REPOSITORY)}:{line}"
        found.append(Block(place, tuple(match["info"].split()), match["text"], text[end : match.start()]))
        end = match.end()
    return found


def long_commands() -> Iterator[Any]:
    """``rafce train`` and ``rafce tune`` of blocks that are not run, as their arguments."""
    for page in PAGES:
        for block in blocks(page):
            if block.words == ("sh", "long"):
                for line in block.text.replace("\\\n", " ").replace("python -m rafce_ray.", "rafce ").splitlines():
                    program, _, rest = line.partition(" ")
                    if program == "rafce":
                        yield pytest.param(rest, id=block.place)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_command_is_marked(page: Path):
    for block in blocks(page):
        kind = block.words[1:2]
        if not block.is_command:
            assert not COMMAND.search(block.text), f"{block.place}: holds commands: give it the info string sh"
        elif block.is_run:
            assert str(page.relative_to(REPOSITORY)) in GUIDES, (
                f"{block.place}: nothing runs it: mark it, or add the page to GUIDES"
            )
        elif kind[0] in NOT_RUN:
            # A page of results tells how they were made; nobody is to follow it.
            assert page.parent.name == "results" or NOT_RUN[kind[0]] in " ".join(block.before.split()), (
                f"{block.place}: say before it: {NOT_RUN[kind[0]]}"
            )
        else:
            files = [REPOSITORY / word for word in block.words[1:]]
            assert all(file.is_file() for file in files), (
                f"{block.place}: {block.words[1:]} are neither a kind nor tests"
            )
            verbs = set(re.findall(r"^rafce (\w+)", block.text, re.MULTILINE))
            imported = "".join(file.read_text() for file in files)
            run = {
                verb
                for verb in verbs
                if re.search(rf"rafce_ray\.(cli\.)?{verb}\b", imported) or f'(["{verb}",' in imported
            }
            assert run == verbs, f"{block.place}: not all of {verbs} are run there"


@pytest.mark.parametrize("command", list(long_commands()))
def test_commands_that_take_long_are_good_ones(command: str, monkeypatch: pytest.MonkeyPatch, capsys):
    """Their configuration is read, and nothing is trained."""
    monkeypatch.chdir(REPOSITORY)
    argv = shell_words(command)
    assert argv[0] in VERBS
    if argv[0] in ("train", "tune"):
        assert rafce([*argv, "--print-config"]) == 0, capsys.readouterr().err


def shell_words(command: str) -> list[str]:
    """As the shell splits them, comments left out."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        place = (page.parent / target).resolve() if target else page
        link = f"{page.relative_to(REPOSITORY)}: {target}#{anchor}"
        assert place.exists(), link
        assert not anchor or anchor in anchors(place), link


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as they are made where the repository is shown."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


class Walk:
    """The folder in which the pages' commands run, with the environment's programs first on PATH."""

    def __init__(self, folder: Path, ray_folder: Path, ray_address: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.server: subprocess.Popen[str] | None = None
        self.printed = ""
        home = folder.parent / "home"
        home.mkdir()
        self.environment = os.environ | {
            "RAY_ADDRESS": ray_address,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "COLUMNS": "160",
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(ray_folder),
        }

    def go_through(self, page: Path) -> None:
        everything = ""
        for block in (found := blocks(page)):
            if block.is_run:
                self._serve(block) if block.words[1:] == ("server",) else self._run(block)
                everything += self.printed
            elif block.is_output and everything:
                check_output(block, self.printed)
        for block in found[: next(place for place, block in enumerate(found) if block.is_run)]:
            # What a page begins with is printed by something that it shows later.
            if block.is_output:
                check_output(block, everything)

    def _run(self, block: Block) -> None:
        expected = int(block.words[2]) if block.words[1:] else 0
        argv = ["bash", "-euo", "pipefail", "-c", block.text.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")]
        since = time.monotonic()
        done = subprocess.run(argv, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        print(f"{block.place}: {time.monotonic() - since:.1f} s")
        self.printed = done.stdout + done.stderr
        assert done.returncode == expected, f"{block.place}:\n{block.text}\n{self.printed}"
        assert "Traceback" not in self.printed, f"{block.place}:\n{self.printed}"

    def _serve(self, block: Block) -> None:
        command = block.text.replace("rafce serve", f"exec rafce serve --port {self.port}")
        since = time.monotonic()
        with (self.folder.parent / "server").open("w+") as said:
            argv = ["bash", "-euo", "pipefail", "-c", command]
            # With a cluster of its own, in which requests come by HAProxy.
            alone = {key: value for key, value in self.environment.items() if key != "RAY_ADDRESS"}
            self.server = subprocess.Popen(
                argv, cwd=self.folder, env=alone, stdout=subprocess.PIPE, stderr=said, text=True
            )
            line = self.server.stdout.readline()
            print(f"{block.place}: {time.monotonic() - since:.1f} s")
            said.seek(0)
            self.printed = line + said.read()
        assert line.strip() == f"http://127.0.0.1:{self.port}", f"{block.place}:\n{self.printed}"

    def end(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(60)
            self.server.stdout.close()


@pytest.fixture(scope="module")
def walk_to(ray_cluster_of_tests, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """``walk_to(page)``: goes through the pages up to this one, each once; trains on the cluster of the session, which
    saves starts.
    """
    import ray

    folder = tmp_path_factory.mktemp("walk") / "here"
    folder.mkdir()
    photograph = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        shutil.copy(photograph, folder / name)
    walked: list[str] = []
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        walk = Walk(folder, Path(ray_folder), ray.get_runtime_context().gcs_address)

        def to(page: str) -> None:
            for name in GUIDES[: GUIDES.index(page) + 1]:
                if name not in walked:
                    walked.append(name)
                    walk.go_through(REPOSITORY / name)

        yield to
        walk.end()


@pytest.mark.ray
@pytest.mark.needs("curl")
@pytest.mark.parametrize("page", GUIDES)
def test_the_commands_of_a_page_do_what_it_says(page: str, walk_to: Callable[[str], None]):
    walk_to(page)


def check_output(block: Block, printed: str) -> None:
    """Hold a shown output against the printed one."""
    if block.words[0] == "json":
        shown = json.loads(re.sub(r",?\s*\.\.\.", "", block.text))
        check_shape(shown, last_json(printed, block.place), block.place)
        return
    found = " ".join(printed.split())
    for line in filter(None, map(str.strip, block.text.splitlines())):
        assert re.search(pattern_of(line), found), f"{block.place}: {line!r} is not among what is printed:\n{printed}"


def pattern_of(line: str) -> str:
    """The words of a shown line, with any numbers in the places of its numbers and anything in that of ``...``."""
    parts = []
    for part in re.split(r"\.\.\.|(?<![\w.])\d[\d.,]*(?<![.,])", line):
        parts.append(r"\s+".join(re.escape(word) for word in part.split(" ")))
    marks = re.findall(r"\.\.\.|(?<![\w.])\d[\d.,]*(?<![.,])", line)
    between = [".*?" if mark == "..." else r"\d[\d.,]*" for mark in marks]
    return "".join(part + gap for part, gap in zip(parts, [*between, ""], strict=True))


def last_json(printed: str, place: str) -> Any:
    for line in reversed(printed.splitlines()):
        if line.startswith(("{", "[")):
            return json.loads(line)
    raise AssertionError(f"{place}: no JSON among what is printed:\n{printed}")


def check_shape(shown: Any, found: Any, place: str) -> None:
    """The same keys and kinds of values all the way down; a shown list may have fewer items."""
    kinds = [type(None if value is None else 0.0 if type(value) is int else value) for value in (shown, found)]
    assert kinds[0] is kinds[1] or type(None) in kinds, f"{place}: {shown!r} is shown, {found!r} is printed"
    if isinstance(shown, dict):
        assert set(shown) == set(found), place
        for key, value in shown.items():
            check_shape(value, found[key], f"{place}: {key}")
    elif isinstance(shown, list) and found:
        for value in shown:
            check_shape(value, found[0], place)


@pytest.mark.parametrize(
    ("line", "printed", "fits"),
    [
        ("9 of 239 rows (3.8%) cannot be read", "11 of 1,240 rows (0.9%) cannot be read", True),
        ("9 of 239 rows cannot be read", "9 of 239 rows can be read", False),
        ("AU12 0.97", "AU12 0.5", True),
        ("AU12 0.97", "AU13 0.5", False),
        ("made ... and ...html", "made runs/first/bundle and runs/first/report.html; next", True),
    ],
)
def test_a_shown_line_stands_for_its_words(line: str, printed: str, fits: bool):
    assert bool(re.search(pattern_of(line), printed)) is fits


def test_a_shown_answer_stands_for_its_keys():
    check_shape({"a": [{"b": 1}], "c": None}, {"a": [{"b": 2.5}, {"b": 3}], "c": "x"}, "here")
    for other in ({"a": []}, {"a": [{"b": "1"}], "c": None}, {"a": [{"d": 1}], "c": None}):
        with pytest.raises(AssertionError):
            check_shape({"a": [{"b": 1}], "c": None}, other, "here")
