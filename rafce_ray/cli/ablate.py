"""``rafce ablate``: run an ablation, eight training changes alone and combined."""

from __future__ import annotations

import argparse

from rafce_ray.base.console import print_json, say, to_json
from rafce_ray.base.errors import UsageError
from rafce_ray.cli.arguments import add_configuration, command, require_data_root


@command
def main(argv: list[str]) -> int:
    """``rafce ablate``; exit code 1 if a trial has no result."""
    arguments = _parser().parse_intermixed_args(argv)
    from rafce_ray.config import load_config

    base = load_config(arguments.config, arguments.overrides, recipe=arguments.recipe)
    require_data_root(base)
    if arguments.seeds < 1:
        raise UsageError(f"--seeds {arguments.seeds}: expected at least 1; 3 tell luck from effect.")
    from rafce_ray.study.ablation import ablated_keys, ablation_arms, markdown, plot
    from rafce_ray.tune.ablation import ablate

    varied = ablated_keys(ablation_arms(base)) - {"data.action_units"}
    set_in_vain = [text for text in arguments.overrides if text.partition("=")[0].strip() in varied]
    if set_in_vain:
        raise UsageError(
            f"{set_in_vain[0]!r}: the arms set this key themselves. Leave it out, or train with it: rafce train "
            f"{set_in_vain[0]}"
        )
    study, ablation = ablate(
        base,
        seeds=arguments.seeds,
        only=arguments.arms.split(",") if arguments.arms else (),
        minority=arguments.minority.split(",") if arguments.minority else None,
        concurrent=arguments.concurrent,
    )
    table = markdown(ablation)
    (study.location / "ablation.json").write_bytes((to_json(ablation.to_json()) + "\n").encode())
    (study.location / "ablation.md").write_bytes(table.encode())
    (study.location / "ablation.svg").write_bytes(plot(ablation))
    print(table)
    if arguments.json:
        print_json(ablation.to_json())
    place = study.location.shown
    say(f"made {place}: ablation.md, ablation.json, ablation.svg; next: rafce doctor {place}")
    if ablation.missing:
        say(
            f"{len(ablation.missing)} trials have no result and are left out: {', '.join(ablation.missing)}. The same "
            "command goes on with them."
        )
    return 1 if ablation.missing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce ablate",
        description="Run an ablation: eight training changes, alone and combined, over several seeds. If it was "
        "interrupted, the same command continues it.",
        epilog="Example: rafce ablate data.root=faces model.backbone=mobilenet_v3_small model.weights=none "
        "model.image_px=64 optim.epochs=24",
    )
    add_configuration(parser, "configuration keys: data and size of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per arm (default 3)")
    parser.add_argument("--arms", metavar="A,B", help="run these arms only, and the arms that they are compared with")
    parser.add_argument(
        "--minority",
        metavar="A,B",
        help="classes whose F1 is shown, by name or number (default: the seed's four without a hit, or the four "
        "rarest)",
    )
    parser.add_argument(
        "--concurrent", type=int, help="trials that run at the same time (default: one per GPU, or per CPU)"
    )
    return parser
