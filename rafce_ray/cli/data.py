"""``rafce data``: audit labelled faces, split them, cut them out of photographs, download or draw some."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rafce_ray.base.console import printable, progress_bar, say, to_json, warn
from rafce_ray.base.errors import GateError, UsageError
from rafce_ray.cli.arguments import command, local_path, parse_verb, share
from rafce_ray.faces import MIN_FACE_SCORE

if TYPE_CHECKING:
    from rafce_ray.data.align import Aligned
    from rafce_ray.data.audit import Audit

_OVERRIDE = re.compile(r"^\w+\.\w+=")


@command
def main(argv: list[str]) -> int:
    """Run the verb; 0 done, 1 failed, 2 usage, 3 the data may not be trained on."""
    parser, verbs = _parser()
    parse_verb(parser, argv, verbs)
    # argparse does not accept overrides after an option.
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.action not in (_audit, _split, _align) or not all(_OVERRIDE.match(text) for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    exit_code: int = arguments.action(arguments, rest)
    return exit_code


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = argparse.ArgumentParser(
        prog="rafce data",
        description="Audit labelled faces, split them, cut them out of photographs, download or draw some.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser(
        "audit",
        usage="%(prog)s ROOT [--json FILE] [--labels-only] [--config FILE] [--recipe NAME] [data.key=value ...]",
        help="check labels and images of a dataset before training",
        description="Check labels and images of a dataset: what it contains, and errors with their files and lines. "
        "Exit code 3: the dataset may not be trained on.",
    )
    verb.add_argument("root", help="folder in RAF-CE's layout, or a CSV or Parquet table, or a folder that holds one")
    verb.add_argument("--json", metavar="FILE", help="write the whole audit as JSON; - for standard output")
    verb.add_argument("--config", metavar="FILE", help="take the data section of this configuration")
    verb.add_argument("--recipe", metavar="NAME", help="take the data section of this recipe")
    verb.add_argument("--labels-only", action="store_true", help="do not open the images")
    verb.set_defaults(action=_audit)
    verb = verbs.add_parser(
        "split",
        usage="%(prog)s ROOT [--by COLUMN] [--fractions TRAIN,VALIDATION,TEST] [--seed S] [data.key=value ...]",
        help="divide a dataset without splits into train, validation and test",
        description="Write a copy of the labels with a column 'split' next to the original. Emotions and action units "
        "keep their proportions; with --by, each person is in one split only.",
    )
    verb.add_argument("root", help="folder or table without splits, as for audit")
    verb.add_argument("--by", metavar="COLUMN", help="images with the same value stay together, such as a person's")
    verb.add_argument(
        "--fractions",
        type=_fractions,
        metavar="TRAIN,VALIDATION,TEST",
        help="share of each split (default 0.7,0.15,0.15)",
    )
    verb.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed gives the same split (default %(default)s)"
    )
    verb.set_defaults(action=_split)
    verb = verbs.add_parser(
        "align",
        usage="%(prog)s ROOT --out DIR [--px PX] [--several largest|skip] [--face-model FILE] [--min-face-score S] "
        "[data.key=value ...]",
        help="make a dataset of aligned faces out of labelled photographs",
        description="Find the face in every labelled photograph, cut it out as rafce predict does, and write the faces "
        "to DIR/aligned/ with the same labels, splits and other columns. Photographs without a face are left out and "
        "listed in DIR/align.jsonl. The same command resumes.",
    )
    verb.add_argument("root", help="labelled photographs in any layout that audit reads")
    verb.add_argument("--out", required=True, type=local_path, metavar="DIR", help="new folder")
    _add_alignment(verb)
    verb.add_argument(
        "--several",
        choices=("largest", "skip"),
        default="largest",
        help="photographs with several faces: take the largest, or leave them out (default %(default)s)",
    )
    verb.set_defaults(action=_align)
    verb = verbs.add_parser(
        "fetch",
        help="download photographs with labels, and align their faces",
        description="Download the Face Research Lab London Set (102 people, neutral and smiling; CC BY 4.0), check the "
        "sha256 of each file, and align the faces. The same command resumes.",
    )
    verb.add_argument("name", choices=("london",), help="which photographs")
    verb.add_argument(
        "--out", type=local_path, default="faces/london", metavar="DIR", help="new folder (default %(default)s)"
    )
    verb.add_argument("--url", metavar="BASE", help="mirror with the same paths (default: the repository on GitHub)")
    _add_alignment(verb)
    verb.set_defaults(action=_fetch)
    verb = verbs.add_parser(
        "synthesize",
        help="draw labelled demo faces in RAF-CE's layout",
        description="Draw synthetic labelled faces with RAF-CE's layout, class proportions and label noise, to try the "
        "commands.",
    )
    verb.add_argument("--out", required=True, type=local_path, metavar="DIR", help="new folder")
    verb.add_argument("--num-images", type=int, default=4549, metavar="N", help="labelled faces (default %(default)s)")
    verb.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed draws the same faces (default %(default)s)"
    )
    verb.set_defaults(action=_synthesize)
    return parser, list(verbs.choices)


def _add_alignment(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--px", type=_face_px, default=224, help="side of an aligned face, px (default %(default)s)")
    verb.add_argument("--face-model", type=Path, metavar="FILE.onnx", help="detection model, as for rafce predict")
    verb.add_argument(
        "--min-face-score",
        type=share,
        default=MIN_FACE_SCORE,
        metavar="S",
        help=f"confidence of a face, as for rafce predict (default {MIN_FACE_SCORE})",
    )


def _face_px(text: str) -> int:
    if not text.isdecimal() or not 32 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 32 to 1024")
    return int(text)


def _audit(arguments: argparse.Namespace, given: list[str]) -> int:
    from rafce_ray.config import load_config

    overrides = [*given, f"data.root={_yaml_text(arguments.root)}"]
    data = load_config(arguments.config, overrides, recipe=arguments.recipe).data
    goes_to = {None: "the audit goes to standard output", "-": "JSON goes to standard output"}
    say(f"Auditing {arguments.root}; {goes_to.get(arguments.json, f'JSON goes to {arguments.json}')}.")
    from rich.console import Console

    from rafce_ray.base.console import console
    from rafce_ray.data.audit import audit, render

    found = audit(data, images=not arguments.labels_only, progress=progress_bar)
    if arguments.json == "-":
        render(found, console)
        sys.stdout.write(to_json(found.to_json()) + "\n")
    else:
        render(found, Console(highlight=False, soft_wrap=True))
        if arguments.json is not None:
            _write_json(arguments.json, found)
    counts = ", ".join(
        f"{sum(finding.level == level for finding in found.findings)} {level}"
        for level in ("refusal", "error", "warning", "info")
    )
    counted = f"Findings: {counts}." + ("" if arguments.json in (None, "-") else f" Written to {arguments.json}.")
    if not found.may_train:
        reasons = "; ".join(finding.message for finding in found.refusals)
        say(f"Refused: this data may not be trained on: {reasons}. {counted}")
        return GateError.exit_code
    again = shlex.join([f"data.root={arguments.root}", *given])
    say(f"May be trained on. {counted} Next: rafce train {again}")
    return 0


def _yaml_text(text: str) -> str:
    """Quoted, so that no path is read as a number or a list."""
    return "'" + text.replace("'", "''") + "'"


def _write_json(place: str, found: Audit) -> None:
    from rafce_ray.base.storage import locate

    try:
        locate(place).write_bytes((to_json(found.to_json()) + "\n").encode())
    except OSError as error:
        raise UsageError(f"--json {place}: cannot be written ({error}). Name a file in a folder that can.") from error


def _fractions(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = (float(one) for one in text.split(","))
    except ValueError:
        train = validation = test = -1.0
    if min(train, validation) <= 0 or test < 0 or abs(train + validation + test - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text!r}: write three shares that add up to 1, such as 0.7,0.15,0.15")
    return train, validation, test


def _split(arguments: argparse.Namespace, given: list[str]) -> int:
    from rafce_ray.config import load_config

    data = load_config(None, [*given, f"data.root={_yaml_text(arguments.root)}"]).data
    from rich.console import Console

    from rafce_ray.data.audit import audit, render
    from rafce_ray.data.records import SPLITS, counted
    from rafce_ray.data.split import FRACTIONS, write_split

    made = write_split(data, by=arguments.by, fractions=arguments.fractions or FRACTIONS, seed=arguments.seed)
    # The copy is a table of UTF-8 text, whatever was read.
    kept = [one for one in given if one.partition("=")[0].strip() not in ("data.encoding", "data.layout")]
    found = audit(load_config(None, [*kept, f"data.root={_yaml_text(made.root.shown)}"]).data, images=False)
    render(found, Console(highlight=False, soft_wrap=True))
    parts = [
        f"{split} {counted(made.num_images[split], 'image')}"
        + ("" if made.num_groups is None else f" with {counted(made.num_groups[split], 'value')} of {arguments.by!r}")
        for split in SPLITS
    ]
    say(f"Wrote {made.written.shown}: {', '.join(parts)}. The labels that were there are as they were.")
    if made.num_alone:
        warn(f"{counted(made.num_alone, 'image')} with a blank {arguments.by!r} were split one by one")
    if arguments.by is None:
        told = "the same person may be in train and in test, which makes the figures too good."
        if made.person is not None:
            again = shlex.join(["rafce", "data", "split", arguments.root, "--by", made.person, *given])
            told += f" Column {made.person!r} names the person: rm {made.written.command} && {again}"
        elif made.columns:
            told += " If a column names the person, split with --by COLUMN."
        warn(told)
    say(f"Next: {shlex.join(['rafce', 'data', 'audit', made.root.shown, *kept])}")
    return 0


_MAX_LISTED = 10


def _align(arguments: argparse.Namespace, given: list[str]) -> int:
    from rafce_ray.base.storage import locate
    from rafce_ray.config import load_config
    from rafce_ray.data.align import AlignSettings, align

    data = load_config(None, [*given, f"data.root={_yaml_text(arguments.root)}"]).data
    settings = AlignSettings(arguments.px, arguments.several, arguments.face_model, arguments.min_face_score)
    say(f"Aligning the faces of {arguments.root} into {arguments.out}, {settings.px} px a side.")
    made = align(data, locate(arguments.out), settings, progress_bar)
    if not _report_aligned(made, settings.px):
        return 1
    # The faces have a place and an encoding of their own.
    elsewhere = ("data.encoding", "data.layout", "data.images")
    kept = [one for one in given if one.partition("=")[0].strip() not in elsewhere]
    say(f"Next: {shlex.join(['rafce', 'data', 'audit', made.root.shown, f'data.stored_px={settings.px}', *kept])}")
    return 0


def _fetch(arguments: argparse.Namespace, _: list[str]) -> int:
    from rafce_ray.base.storage import locate
    from rafce_ray.data.align import AlignSettings
    from rafce_ray.data.london import REPOSITORY, fetch

    settings = AlignSettings(arguments.px, face_model=arguments.face_model, min_face_score=arguments.min_face_score)
    url = arguments.url or REPOSITORY
    say(
        f"Downloading the Face Research Lab London Set from {url} into {arguments.out}. Lisa DeBruine and Benedict "
        "Jones, figshare 5047666, CC BY 4.0."
    )
    made = fetch(locate(arguments.out), settings, url, progress_bar)
    if not _report_aligned(made, settings.px):
        return 1
    root = f"data.root={made.root.shown}"
    say(f"Next: {shlex.join(['rafce', 'train', '--recipe', 'few', root, f'data.stored_px={settings.px}'])}")
    return 0


def _report_aligned(made: Aligned, px: int) -> bool:
    """Say which photographs have an aligned face and which have none; whether any has."""
    num_aligned = len(made.records) - len(made.left_out)
    for title, found in (("without an aligned face", made.left_out), ("with several faces", made.with_several)):
        if found:
            warn(f"photographs {title}: {len(found)}. All are in {(made.root / 'align.jsonl').shown}.")
        for one in found[:_MAX_LISTED]:
            largest = f"{one['num_faces']} faces; the largest was taken."
            say(f"  {printable(one['name'])}: {one['message'] or largest}")
    say(
        f"Aligned {num_aligned} of {len(made.records)} photographs: {made.root.shown} has their faces, {px} px a side, "
        "and their labels."
        if num_aligned
        else f"No photograph of {len(made.records)} has an aligned face: no labels were written."
    )
    return num_aligned > 0


def _synthesize(arguments: argparse.Namespace, _: list[str]) -> int:
    from rafce_drawing.labelled import synthesize

    say(f"Drawing {arguments.num_images} labelled faces, and some without a label, into {arguments.out}.")
    with ExitStack() as stack:
        # How many there are in all is known at the first report only.
        advance: Callable[[int], None] | None = None
        drawn = 0

        def report(done: int, total: int) -> None:
            nonlocal advance, drawn
            if advance is None:
                advance = stack.enter_context(progress_bar("drawing faces", total))
            advance(done - drawn)
            drawn = done

        summary = synthesize(arguments.out, arguments.num_images, arguments.seed, progress=report)
    splits = ", ".join(f"{count:,} {split}" for split, count in summary.per_split.items())
    say(
        f"Drew {summary.num_labelled:,} labelled faces ({splits}) and {summary.num_extras:,} without a label: "
        f"{summary.root}"
    )
    say(f"Next: {shlex.join(['rafce', 'train', '--recipe', 'demo', f'data.root={arguments.out}'])}")
    return 0
