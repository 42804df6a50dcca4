"""One program at a time changes a registry, on any filesystem that lists what was written before (disks, S3, GCS, ...).

Each writes a claim of its own and only then looks for others: of two that meet, at least one sees the other and steps back.
Object stores offer nothing better through pyarrow, whose writes know no conditions.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rafce_ray.errors import RafceError
from rafce_ray.storage import Location

CLAIMS = "claims"
STALE_S = 30.0
"""Seconds, by the storage's own clock, after which a claim is a dead program's: a live one holds it for a few requests."""

PATIENCE_S = 3 * STALE_S
"""Seconds for which a registry that others hold is tried again."""

PAUSE_S = (0.02, 0.2)
"""Least and most seconds before trying again; drawn, so that two that met do not meet for ever."""


@contextmanager
def sole_writer(registry: Location) -> Iterator[Callable[[], None]]:
    """Hold the registry while the block lasts; yields a check to call before each write.

    Raises:
        RafceError: another program holds it for longer than a claim can last, or (from the check) this one held it too long.
    """
    own = registry / CLAIMS / f"{uuid.uuid4().hex}.json"
    give_up = time.monotonic() + PATIENCE_S
    while True:
        # From before the claim: writing it may have taken long.
        held_since = time.monotonic()
        if _is_alone(own):
            break
        own.delete()
        if time.monotonic() > give_up:
            raise RafceError(
                f"{registry.shown}: other programs have been changing this registry for {PATIENCE_S:.0f} s. Try again; if there "
                f"are none, remove {(registry / CLAIMS).shown}."
            )
        # Not cryptography: only to be out of step with the other one.
        time.sleep(random.uniform(*PAUSE_S))

    def check() -> None:
        if time.monotonic() - held_since > STALE_S / 2:
            raise RafceError(
                f"{registry.shown}: the storage took more than {STALE_S / 2:.0f} s to answer, so that another program may be changing "
                "the registry by now. Nothing was changed; try again."
            )

    try:
        yield check
    finally:
        # A claim that cannot be removed ends by itself.
        with suppress(OSError):
            own.delete()


def _is_alone(own: Location) -> bool:
    """Write the claim and see whether it is the only one; claims of dead programs are removed."""
    own.write_bytes(b"{}")
    claims = [info for info in own.parent.list() if info.is_file and not info.base_name.startswith(".")]
    written = next((info.mtime_ns for info in claims if info.base_name == own.name), None)
    # Not there any more: another one took it for a dead program's.
    alone = any(info.base_name == own.name for info in claims)
    for info in claims:
        if info.base_name == own.name:
            continue
        if written is not None and info.mtime_ns is not None and written - info.mtime_ns > STALE_S * 1e9:
            (own.parent / info.base_name).delete()
        else:
            alone = False
    return alone
