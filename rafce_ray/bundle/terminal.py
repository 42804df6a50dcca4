"""Draws a face and its prediction in a terminal: half blocks in colour, or characters by brightness without colours."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from rafce_ray.base.console import printable
from rafce_ray.bundle.model import FilePrediction
from rafce_ray.faces.files import LoadedFile

WIDTH = 32
"""Columns of the picture; it has half as many lines."""

BAR = 12
"""Columns of a bar of probability 1."""

BRIGHTNESS = " .:-=+*#%@"
"""Characters from dark to bright."""


def show(result: FilePrediction, file: LoadedFile, console: Console | None = None) -> None:
    """Print each face of a file, ``file.faces``, with its most probable emotions and active action units; or the error.

    ``console``: standard output by default.
    """
    console = console or Console()
    if result.problem is not None:
        console.print(Text(f"{result.path}: {result.problem.message} {result.problem.remedy}"))
    for prediction, face in zip(result.faces, file.faces, strict=True):
        small = np.asarray(cv2.resize(face.pixels, (WIDTH, WIDTH), interpolation=cv2.INTER_AREA), np.uint8)
        bars = Table.grid(padding=(0, 1))
        for _ in range(3):
            bars.add_column(no_wrap=True)
        if prediction.emotion is not None:
            for score in prediction.emotion.top:
                bars.add_row(score.label, *_bar(score.probability, "cyan"))
            if prediction.emotion.unsure:
                bars.add_row(Text("unsure", "bold yellow"))
        for unit in prediction.action_units:
            if unit.active:
                bars.add_row(f"{unit.code} {unit.name}", *_bar(unit.probability, "green"))
        shown = Table.grid(padding=(0, 2))
        shown.add_column(no_wrap=True, min_width=WIDTH)
        shown.add_row(_picture(small, colours=console.color_system is not None), bars)
        console.print(Text(printable(result.path), "bold"), shown, sep="\n")


def _bar(probability: float, colour: str) -> tuple[str, Text]:
    return f"{probability:4.0%}", Text("█" * round(BAR * probability), colour)


def _picture(pixels: NDArray[np.uint8], colours: bool) -> Text:
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        line = Text()
        for above, below in zip(upper, lower, strict=True):
            if colours:
                style = Style.parse(f"rgb({above[0]},{above[1]},{above[2]}) on rgb({below[0]},{below[1]},{below[2]})")
                line.append("▀", style)
            else:
                line.append(BRIGHTNESS[sum(above + below) * len(BRIGHTNESS) // (6 * 256)])
        lines.append(line)
    return Text("\n").join(lines)
