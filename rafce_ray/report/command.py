"""``rafce report``: everything that a run or a study left behind as one HTML page that stands by itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rafce_ray.console import print_json, run_main, say, warn
from rafce_ray.errors import UsageError
from rafce_ray.figures import MAIN
from rafce_ray.hardware import choose_device
from rafce_ray.report.data import SPLITS_OF, ReportData, Split, check_run, gather
from rafce_ray.report.page import render_page
from rafce_ray.report.study_data import gather_study, is_study
from rafce_ray.report.study_page import REPORT_FILE, render_study
from rafce_ray.run_folder import RunFolder
from rafce_ray.storage import Location, locate
from rafce_ray.study.trials import metric_of
from rafce_ray.study_folder import StudyFolder


def write_report(
    folder: RunFolder,
    *,
    split: Split = "validation",
    slices: str | None = None,
    images: bool = True,
    out: str | None = None,
    overrides: Sequence[str] = (),
    store: str | None = None,
    device: str = "auto",
) -> Location:
    """Write a run's report and return where it is: ``report.html`` in the run's folder, replaced if it is there, or ``out``, which must be new.

    The other arguments are those of :func:`rafce_ray.report.data.gather`. Validation figures are the run's own and cost no forward pass.

    Raises:
        UsageError: there is no run here, ``out`` exists, or what is asked for cannot be had of it.
        RafceError: the split cannot be measured.
    """
    place = _place(folder, out)
    data = gather(folder, split=split, slices=slices, images=images, overrides=overrides, store=store, device=device)
    place.write_bytes(render_page(data).encode())
    return place


def _place(folder: RunFolder, out: str | None) -> Location:
    if out is None:
        return folder.location / REPORT_FILE
    place = locate(out)
    if place.exists():
        raise UsageError(f"--out {place}: exists already. Give a new name, or remove it.")
    return place


def main(argv: list[str] | None = None) -> int:
    """``rafce report``."""
    return run_main(_main, argv)


def _main(argv: list[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    choose_device(arguments.device)
    folder, study = RunFolder(arguments.run), StudyFolder(arguments.run)
    if not folder.exists() and is_study(study):
        _report_study(study, arguments)
        return 0
    check_run(folder)
    place = _place(folder, arguments.out)
    say(f"Reporting on {folder.location}, {arguments.split} split, to {place}.")
    data = gather(
        folder,
        split=arguments.split,
        slices=arguments.slices,
        images=not arguments.no_images,
        overrides=arguments.overrides,
        device=arguments.device,
    )
    content = render_page(data).encode()
    place.write_bytes(content)
    for remark in data.remarks:
        warn(remark)
    after = (
        f"rafce report {folder.location.command} --split test"
        if data.split == "validation"
        else f"rafce doctor {folder.location.command}"
    )
    say(f"made {place} ({len(content) / 1000:,.0f} kB); open it in a browser. Next: {after}")
    if arguments.json:
        print_json(_record(data, place, len(content)))
    return 0


def _report_study(study: StudyFolder, arguments: argparse.Namespace) -> None:
    options = {
        "--split": arguments.split != "validation",
        "--slices": arguments.slices is not None,
        "--no-images": arguments.no_images,
        " ".join(arguments.overrides): bool(arguments.overrides),
    }
    given = [option for option, is_given in options.items() if is_given]
    if given:
        raise UsageError(
            f"{', '.join(given)}: means something for one run only, and {study.location} is a study. Leave it out, or give one of its trials, "
            f"{(study.trials / 'NAME').shown}."
        )
    place = _place(RunFolder(study.place), arguments.out)
    say(f"Reporting on the study {study.location}, to {place}.")
    data = gather_study(study, metric_of(study))
    content = render_study(data).encode()
    place.write_bytes(content)
    winner = None if data.winner is None else data.winner.name
    after = (
        f"rafce trials {study.location.command}"
        if winner is None
        else f"rafce report {(study.trials / winner).command}"
    )
    say(f"made {place} ({len(content) / 1000:,.0f} kB); open it in a browser. Next: {after}")
    if arguments.json:
        print_json(
            {
                "report": str(place),
                "num_bytes": len(content),
                "study": str(study.location),
                "metric": data.metric,
                "trials": len(data.trials),
                "finalists": len(data.finalists),
                "winner": winner,
                "judged": data.verdict is not None,
            }
        )


def _record(data: ReportData, place: Location, num_bytes: int) -> dict[str, Any]:
    figures = data.figures or {}
    return {
        "report": str(place),
        "num_bytes": num_bytes,
        "run": data.run.place,
        "status": data.run.status,
        "split": data.split,
        "figures": {key: figures.get(key) for key in ("num_images", *MAIN, "intervals")},
        "diagnoses": [one.to_json() for one in data.diagnoses],
        "groups": None if data.groups is None else data.groups.to_json(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce report", description="Write everything that a run or a study left behind as one HTML page."
    )
    parser.add_argument(
        "run", metavar="RUN_OR_STUDY", help="folder of a run, or of a study of rafce tune; a path or URI"
    )
    parser.add_argument(
        "--split",
        choices=tuple(SPLITS_OF),
        default="validation",
        help="images that the figures are of: validation, as the run measured it (default); test, measured now; or held-out, both together",
    )
    parser.add_argument(
        "--slices",
        metavar="FILE.csv",
        help="attributes of images (name,age,gender,... or name,column,value): figures by group",
    )
    parser.add_argument("--no-images", action="store_true", help="leave all pictures out")
    parser.add_argument(
        "--out", metavar="FILE.html", help=f"a new file (default: {REPORT_FILE} in the run's folder, replaced)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of standard output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.KEY=VALUE",
        help="where the data are, if they are not where training found them",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
