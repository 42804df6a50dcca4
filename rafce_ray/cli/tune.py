"""``rafce tune``: tune hyperparameters on Ray Tune."""

from __future__ import annotations

import argparse

from rafce_ray.base.console import print_json, say, warn
from rafce_ray.cli.arguments import JSON_HELP, command, require_data_root


@command
def main(argv: list[str]) -> int:
    """``rafce tune``; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    from rafce_ray.study.config import load_study, study_yaml

    study = load_study(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(study_yaml(study), end="")
        return 0
    require_data_root(study.base_config, "base.")
    from rafce_ray.base.storage import locate
    from rafce_ray.study.folder import StudyFolder
    from rafce_ray.study.plan import first_line
    from rafce_ray.tune.launch import tune

    say(first_line(study, StudyFolder(str(locate(study.storage) / study.name))))
    unused = study.unused_scheduler_keys()
    if unused:
        warn(f"scheduler.type={study.scheduler.type} does not read {', '.join(f'scheduler.{key}' for key in unused)}.")
    result = tune(study, dry_run=arguments.dry_run, retry_failed=arguments.retry_failed)
    if result is None:
        say("dry run: nothing was trained; without --dry-run the study starts")
    elif arguments.json:
        print_json(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce tune",
        description="Tune hyperparameters on Ray Tune, train the best configurations again with other seeds, and "
        "measure the winner on the test split. If a study was interrupted, the same command continues it.",
        epilog="Example: rafce tune --config tune_configs/regularization.yaml base.data.root=PATH num_trials=12",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys of the study; they override the file: num_trials=8, base.optim.epochs=20",
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="the study, such as tune_configs/smoke.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and check that it fits; train nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again")
    parser.add_argument("--print-config", action="store_true", help="print the resolved study as YAML and stop")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser
