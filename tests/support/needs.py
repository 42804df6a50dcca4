"""Programs, data and hardware that some tests need: one table, read by the tests, by the test runner and by CI.

``python tests/support/needs.py`` prints the Debian packages of the programs that are missing here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data"
"""Real photographs. They lie next to the repository and are never part of it."""


@dataclass(frozen=True)
class Need:
    """``programs``: any of them will do. ``package``: their Debian package.

    ``remedy``: what to do where there is no package.
    """

    title: str
    is_here: Callable[[], bool]
    package: str | None = None
    remedy: str = ""

    @property
    def reason(self) -> str:
        """Why a test is skipped without it, and how to get it."""
        return f"{self.title} is missing: {self.remedy or f'apt-get install {self.package}'}"


def _program(title: str, package: str, *names: str) -> Need:
    return Need(title, lambda: any(shutil.which(name) for name in names), package)


def has_gpu() -> bool:
    """Whether the driver lists a GPU, and the user has not hidden it.

    torch is not asked: the tests hide GPUs from it.
    """
    if os.environ.get("RAFCE_TEST_GPUS") in ("", "-1") or shutil.which("nvidia-smi") is None:
        return False
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def has_photographs() -> bool:
    """Whether all sets are there that tests read."""
    return all((PHOTOGRAPHS / name).is_dir() for name in ("photos", "london_smiles", "london_photos"))


CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

NEEDS = {
    "chromium": _program("Chromium", "chromium", *CHROMIUM),
    "prometheus": _program("Prometheus", "prometheus", "prometheus"),
    "promtool": _program("promtool", "prometheus", "promtool"),
    "curl": _program("curl", "curl", "curl"),
    "git": _program("git", "git", "git"),
    "photographs": Need("a folder of photographs", has_photographs, remedy="put it at ../shared/data"),
    "gpu": Need("a GPU", has_gpu, remedy="use a machine with an NVIDIA GPU and its driver"),
}

MAY_BE_MISSING = ("photographs", "gpu")
"""CI installs everything else, and fails if a test was skipped for want of it."""


def missing_packages() -> list[str]:
    """Debian packages of the programs that are not here."""
    return sorted({need.package for need in NEEDS.values() if need.package and not need.is_here()})


if __name__ == "__main__":
    print(" ".join(missing_packages()))
