"""What leaves this machine: the image's recipe, its builder's context, and what a submitted job uploads. Never data."""

import shlex
from importlib.metadata import distribution
from pathlib import Path

import pytest
from docker.utils import exclude_paths
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray._private.runtime_env.packaging import _dir_travel

REPOSITORY = Path(__file__).parents[1]
OF_THE_IMAGE = ".[serve,export,mlflow,weights]"
NEVER = (
    "faces/aligned/train_00001.png",
    "faces/RAFCE_emolabel.txt",
    "photo.jpg",
    "labels.csv",
    "keys.json",
    "runs/study/best/model.safetensors",
    "demo/faces/aligned/test_0001.png",
    "shared/data/faces.parquet",
    ".git/config",
    ".venv/bin/python",
    "venv/bin/python",
    ".cache/stores/images.arrow",
    ".env",
    "tests/conftest.py",
)
"""What may lie in a checkout and must stay there."""

NEEDED = (
    "rafce_ray/train/launch.py",
    "rafce_drawing/paint.py",
    "rafce_ray/recipes/best.yaml",
    "tune_configs/smoke.yaml",
)
CACHED = "rafce_ray/data/__pycache__/table.cpython-311.pyc"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout in which data, results, keys and environments lie about."""
    for name in (*NEVER, *NEEDED, CACHED, "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "my_study.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for name in (".dockerignore", ".rayignore", ".gitignore"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    return tmp_path


def test_the_builder_gets_the_code_and_nothing_else(checkout):
    patterns = (checkout / ".dockerignore").read_text().splitlines()
    sent = {name for name in exclude_paths(str(checkout), patterns) if (checkout / name).is_file()}
    # Docker itself always sends the ignore file and the Dockerfile.
    assert sent - {".dockerignore", "Dockerfile"} == {
        *NEEDED,
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
    }


def test_a_submitted_job_uploads_the_code_and_studies_and_nothing_else(checkout):
    uploaded: set[str] = set()
    _dir_travel(checkout, [], lambda path: uploaded.add(str(path.relative_to(checkout))), include_gitignore=True)
    assert {name for name in uploaded if (checkout / name).is_file()} == {*NEEDED, "my_study.yaml"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = (REPOSITORY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_image_is_rays_own_of_the_version_that_is_pinned():
    (base,) = [rest for name, rest in instructions() if name == "FROM"]
    assert base == f"rayproject/ray:{pins()['ray']}-py311${{VARIANT}}"
    assert [rest for name, rest in instructions() if name == "ARG"] == ['VARIANT=""', "VARIANT"]
    assert f'"ray[default,train,tune,serve]=={pins()["ray"]}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_the_image_runs_as_no_root_and_holds_no_secret():
    names = [name for name, _ in instructions()]
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users[-1] == "1000:100"
    assert users[0] == "0"
    assert names[-1] == "USER", "nothing is done after root is left"
    assert set(names) == {"ARG", "FROM", "USER", "WORKDIR", "COPY", "RUN"}, (
        "no ADD, which fetches what it is told; no ENV of a secret"
    )


def test_the_image_gets_files_by_name_and_dependencies_by_the_lock():
    copied = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    assert copied == [
        ["pyproject.toml", "constraints.txt", "README.md", "LICENSE", "./"],
        ["rafce_ray", "rafce_ray"],
        ["rafce_drawing", "rafce_drawing"],
        ["tune_configs", "tune_configs"],
    ]
    commands = [part for name, rest in instructions() if name == "RUN" for part in rest.split("&&")]
    (install,) = [part for part in commands if "install" in part]
    assert "--constraint constraints.txt" in install
    assert f'"{OF_THE_IMAGE}"' in install


def test_the_lock_has_every_package_of_the_image():
    """Those that torch pins itself and that only its builds for CUDA have are left out."""
    own = {"rafce-ray", "setuptools"}
    needed = {
        name
        for name in requirements(OF_THE_IMAGE.replace(".", "rafce_ray", 1))
        if not name.startswith(("nvidia-", "cuda-", "triton"))
    }
    assert sorted(needed - own - pins().keys()) == []


def requirements(wanted: str) -> set[str]:
    """Names of all installed packages that one with its extras needs, itself included."""
    seen: set[tuple[str, str]] = set()
    ahead = [Requirement(wanted)]
    while ahead:
        one = ahead.pop()
        for extra in ("", *one.extras):
            if (canonicalize_name(one.name), extra) not in seen:
                seen.add((canonicalize_name(one.name), extra))
                parts = [Requirement(text) for text in distribution(one.name).requires or ()]
                ahead += [part for part in parts if part.marker is None or part.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}
