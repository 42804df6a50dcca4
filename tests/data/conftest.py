"""Small datasets for the tests of reading, auditing and storing."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

SPLIT_CODES = ("0", "0", "0", "2", "1")

MakeFaces = Callable[..., Path]


def write_image(path: Path, seed: int, px: int = 48) -> None:
    """A smooth random picture: any two seeds look nothing alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.resize(coarse, (px, px), interpolation=cv2.INTER_CUBIC))


@pytest.fixture
def make_faces(tmp_path: Path) -> MakeFaces:
    """A function that writes ``num`` pictures in RAF-CE's layout: class i % 2, AU12 on class 1, AU4 on every third."""

    def make(num: int = 100, name: str = "faces", px: int = 48) -> Path:
        root = tmp_path / name
        stems = [f"{i + 1:04d}" for i in range(num)]
        for i, stem in enumerate(stems):
            write_image(root / "aligned" / f"{stem}_aligned.jpg", seed=i, px=px)
        tokens = ["+".join(["12"] * (i % 2) + ["4"] * (i % 3 == 0)) or "25" for i in range(num)]
        lines = {
            "RAFCE_emolabel.txt": [f"{stem}.jpg {i % 2}" for i, stem in enumerate(stems)],
            "RAFCE_AUlabel.txt": [f"{stem}.jpg {tokens[i]}" for i, stem in enumerate(stems)],
            "RAFCE_partition.txt": [f"{stem}.jpg {SPLIT_CODES[i % 5]}" for i, stem in enumerate(stems)],
        }
        for file, rows in lines.items():
            (root / file).write_text("\n".join(rows))
        return root

    return make
