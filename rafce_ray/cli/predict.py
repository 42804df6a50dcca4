"""``rafce predict``: predict emotions and action units from image files, here or on a Ray cluster."""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import tee
from pathlib import Path

from rafce_ray.base.console import progress_bar, say
from rafce_ray.base.errors import UsageError
from rafce_ray.cli.arguments import BUNDLE_HELP, DEVICE_HELP, command, positive, share
from rafce_ray.faces import MIN_FACE_SCORE


@command
def main(argv: list[str]) -> int:
    """``rafce predict``; exit code 1 if nothing at all could be predicted."""
    arguments = _arguments(argv)
    if arguments.ray:
        return _main_on_ray(arguments)
    for name in ("workers", "shard_files"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: is for predicting on a cluster. Add --ray, or leave it out.")
    uris = [path for path in arguments.paths if "://" in path and not path.startswith("file://")]
    if uris:
        raise UsageError(f"{uris[0]}: object stores are read on a cluster alone. Add --ray --out FOLDER.")
    return _main_here(arguments)


def _main_here(arguments: argparse.Namespace) -> int:
    import torch

    from rafce_ray.base.hardware import choose_device, num_cores
    from rafce_ray.bundle.bundle import load_bundle
    from rafce_ray.bundle.model import Predictor, detector_of, in_words, outcomes, predict_files
    from rafce_ray.bundle.terminal import show
    from rafce_ray.bundle.writing import check_out, open_output
    from rafce_ray.faces.detect import build_face_finder
    from rafce_ray.faces.files import Skipped, find_images, load_ahead, load_file

    out = check_out(None if arguments.out is None else Path(arguments.out))
    device, skipped = choose_device(arguments.device), Skipped()
    num_files = sum(1 for _ in find_images(arguments.paths, skipped))
    finder = None if arguments.faces == "aligned" else build_face_finder(arguments.face_model, arguments.min_face_score)
    bundle = load_bundle(arguments.bundle)
    predictor = Predictor(bundle, device)
    # A core is left to reading: OpenMP's threads wait in a busy loop, which cost a factor of 10 where they had to
    # share.
    torch.set_num_threads(min(torch.get_num_threads(), max(1, num_cores() - 1)))
    say(
        f"Predicting {num_files:,} image files on {predictor.device}: faces "
        f"{detector_of(arguments.faces, arguments.face_model)}; {bundle.architecture.backbone} of {bundle.path} "
        f"({bundle.taxonomy.num_emotions} emotions, {bundle.taxonomy.num_action_units} action units); results to "
        f"{arguments.out or ('the terminal' if arguments.show else 'standard output as JSON lines')}."
    )
    load = partial(load_file, finder=finder, px=bundle.preprocessing.stored_px)
    counts: Counter[str] = Counter()
    draws = arguments.show and out is None
    output = nullcontext(lambda _: None) if draws else open_output(out, bundle, arguments.top_k)
    with progress_bar("predicting", num_files) as advance, output as write:
        loaded, kept = tee(load_ahead(load, find_images(arguments.paths), min(8, num_cores())))
        results = predict_files(predictor, loaded, batch_size=arguments.batch_size, top_k=arguments.top_k)
        for result, file in zip(results, kept, strict=True):
            write(result)
            if arguments.show:
                show(result, file)
            counts.update(outcomes(result))
            advance(1)
    if skipped.counts:
        say(skipped.in_words())
    hint = f"rafce evaluate --bundle {arguments.bundle} measures this bundle on labelled faces."
    if not counts["predicted"]:
        hint = "see what is wrong, and the remedy, under error in each row."
    elif out is None:
        hint = "--out FILE.csv, .parquet or .jsonl keeps them in a file."
    say(f"{in_words(counts)}; written to {arguments.out or 'standard output'}. Next: {hint}")
    return 0 if counts["predicted"] else 1


def _arguments(argv: list[str]) -> argparse.Namespace:
    """The command line. All after ``--`` are paths: argparse does not know that where options may follow paths."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv[:end])
    arguments.paths += argv[end + 1 :]
    if not arguments.paths:
        parser.error("give at least one PATH; for a name that begins with a dash: -- -name.jpg, or ./-name.jpg")
    return arguments


def _main_on_ray(arguments: argparse.Namespace) -> int:
    from rafce_ray.bundle.writing import FORMATS

    if arguments.out is None or Path(arguments.out).suffix.lower() in FORMATS:
        found = "none was given" if arguments.out is None else f"found {arguments.out}"
        raise UsageError(f"--ray: --out must name a folder or a URI for the Parquet files; {found}. Add --out FOLDER.")
    if arguments.show:
        raise UsageError("--show: draws in this terminal, and workers have none. Leave out --show or --ray.")
    if arguments.device not in ("auto", "cpu"):
        raise UsageError(f"--device {arguments.device}: with --ray each worker gets its own GPU. Use auto or cpu.")
    if find_spec("ray") is None:
        raise UsageError("--ray: ray is not installed. Install it with pip install 'rafce_ray[ray]'.")
    from rafce_ray.train.predict import predict_on_ray

    options = {name: value for name, value in vars(arguments).items() if name not in ("paths", "ray", "device", "show")}
    return predict_on_ray(arguments.paths, **options, use_gpu=None if arguments.device == "auto" else False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce predict",
        description="Predict the emotions and action units of all faces in image files. Writes one JSON line per file "
        "to standard output, or one row per face to a CSV or Parquet file; with --ray, predicts on a Ray cluster and "
        "writes a folder of Parquet files.",
    )
    parser.add_argument("paths", nargs="*", metavar="PATH", help="image files, folders (searched recursively) or globs")
    parser.add_argument("--bundle", required=True, help=BUNDLE_HELP)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="new file to write: .jsonl, .csv or .parquet; with --ray a folder or URI, in which the same command "
        "resumes",
    )
    parser.add_argument(
        "--faces",
        choices=("detect", "aligned"),
        default="detect",
        help="detect: find and align the faces in photographs; aligned: each image is one aligned face, as in RAF-CE",
    )
    parser.add_argument(
        "--face-model", type=Path, metavar="FILE.onnx", help="YuNet model for detection instead of the installed one"
    )
    parser.add_argument(
        "--min-face-score",
        type=share,
        default=MIN_FACE_SCORE,
        metavar="SCORE",
        help=f"YuNet's confidence, 0 to 1, from which a face is predicted (default {MIN_FACE_SCORE})",
    )
    parser.add_argument(
        "--show", action="store_true", help="draw each face and its prediction in the terminal, instead of JSON lines"
    )
    parser.add_argument("--top-k", type=positive, default=3, help="emotions listed per face (default 3)")
    parser.add_argument("--batch-size", type=positive, default=64, help="faces per forward pass (default 64)")
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    cluster = parser.add_argument_group(
        "on a cluster",
        "the cluster of RAY_ADDRESS, or a local one; paths may be URIs (s3://...), and every machine must see local "
        "paths",
    )
    cluster.add_argument(
        "--ray",
        action="store_true",
        help="predict on Ray, in shards; an interrupted run resumes with the missing shards",
    )
    cluster.add_argument(
        "--workers", type=positive, metavar="N", help="processes (default: one per GPU, or one per CPU)"
    )
    cluster.add_argument("--shard-files", type=positive, metavar="N", help="images per Parquet file (default 2000)")
    return parser
