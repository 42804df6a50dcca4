"""``rafce report``: write a report of a run or a study as one HTML page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rafce_ray.base.console import print_json, say, warn
from rafce_ray.base.errors import UsageError
from rafce_ray.base.figures import MAIN
from rafce_ray.cli.arguments import DEVICE_HELP, JSON_HELP, add_data_overrides, command

if TYPE_CHECKING:
    from rafce_ray.base.storage import Location
    from rafce_ray.study.folder import StudyFolder


@command
def main(argv: list[str]) -> int:
    """``rafce report``."""
    arguments = _parser().parse_intermixed_args(argv)
    from rafce_ray.base.hardware import choose_device
    from rafce_ray.report.data import check_run, gather
    from rafce_ray.report.page import render_page, report_place
    from rafce_ray.report.study_page import is_study
    from rafce_ray.run.folder import RunFolder
    from rafce_ray.study.folder import StudyFolder

    choose_device(arguments.device)
    folder, study = RunFolder(arguments.run), StudyFolder(arguments.run)
    if not folder.exists() and is_study(study):
        _report_study(study, arguments)
        return 0
    check_run(folder)
    place = report_place(folder.location, arguments.out)
    say(f"Reporting on {folder.location}, {arguments.split} split, to {place}.")
    data = gather(
        folder,
        split=arguments.split,
        slices=arguments.slices,
        images=not arguments.no_images,
        overrides=arguments.overrides,
        device=arguments.device,
    )
    page = render_page(data)
    for remark in data.remarks:
        warn(remark)
    again = f"rafce report {folder.location.command} --split test"
    after = again if data.split == "validation" else f"rafce doctor {folder.location.command}"
    figures = data.figures or {}
    record = {
        "run": data.run.place,
        "status": data.run.status,
        "split": data.split,
        "figures": {key: figures.get(key) for key in ("num_images", *MAIN, "intervals")},
        "diagnoses": [one.to_json() for one in data.diagnoses],
        "groups": data.groups,
    }
    _conclude(page, place, after, record if arguments.json else None)
    return 0


def _report_study(study: StudyFolder, arguments: argparse.Namespace) -> None:
    from rafce_ray.report.page import report_place
    from rafce_ray.report.study_page import gather_study, render_study
    from rafce_ray.study.trials import metric_of

    options = {
        "--split": arguments.split != "validation",
        "--slices": arguments.slices is not None,
        "--no-images": arguments.no_images,
        " ".join(arguments.overrides): bool(arguments.overrides),
    }
    given = [option for option, is_given in options.items() if is_given]
    if given:
        raise UsageError(
            f"{', '.join(given)}: means something for one run only, and {study.location} is a study. Leave it out, or "
            f"give one of its trials, {(study.trials / 'NAME').shown}."
        )
    place = report_place(study.location, arguments.out)
    say(f"Reporting on the study {study.location}, to {place}.")
    data = gather_study(study, metric_of(study))
    winner = None if data.winner is None else data.winner.name
    best = None if winner is None else f"rafce report {(study.trials / winner).command}"
    record = {
        "study": str(study.location),
        "metric": data.metric,
        "trials": len(data.trials),
        "finalists": len(data.finalists),
        "winner": winner,
        "judged": data.verdict is not None,
    }
    after = best or f"rafce trials {study.location.command}"
    _conclude(render_study(data), place, after, record if arguments.json else None)


def _conclude(page: str, place: Location, after: str, record: dict[str, Any] | None) -> None:
    """Write the page, and name the command ``after`` it; ``record``: what --json prints besides the page's size."""
    content = page.encode()
    place.write_bytes(content)
    say(f"made {place} ({len(content) / 1000:,.0f} kB); open it in a browser. Next: {after}")
    if record is not None:
        print_json({"report": str(place), "num_bytes": len(content), **record})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce report", description="Write a report of a run or a study as one self-contained HTML page."
    )
    parser.add_argument(
        "run", metavar="RUN_OR_STUDY", help="folder of a run, or of a study of rafce tune; a path or URI"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test", "held-out"),
        default="validation",
        help="images to report figures of: validation, as measured in training (default); test, measured now; "
        "held-out, both together",
    )
    parser.add_argument(
        "--slices",
        metavar="FILE.csv",
        help="attributes of images (name,age,gender,... or name,column,value): report figures by group",
    )
    parser.add_argument("--no-images", action="store_true", help="leave out all pictures")
    parser.add_argument(
        "--out", metavar="FILE.html", help="a new file (default: report.html in the run's folder, replaced)"
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    add_data_overrides(parser, "current place of the data, if it has been moved")
    return parser
