"""How much is in work at once: a bound in requests and in bytes, told at once instead of queued without end."""

from __future__ import annotations

from types import TracebackType

from rafce_ray.service.problems import Problem

RETRY_AFTER_S = 1


class Admission:
    """The places of one process; ``with admission.place(num_bytes) as place`` takes one or raises Problem ``busy``.

    One event loop uses it, so it needs no lock. A place is given back however its block ends: answered, failed or
    cancelled because the client went away.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.num_requests = 0
        self.num_bytes = 0
        self.num_refused = 0

    def place(self, num_bytes: int = 0) -> Place:
        """A place for a request whose body has ``num_bytes`` as far as is known; more are added as they come.

        Raises:
            Problem: ``busy`` (429) with Retry-After: there is no room.
        """
        if self.num_requests >= self.max_requests:
            self._refuse(f"All {self.max_requests:,} places are taken.")
        if self.num_bytes + num_bytes > self.max_bytes:
            self._refuse(f"Its {num_bytes:,} bytes would exceed the {self.max_bytes:,} that are held at once.")
        self.num_requests += 1
        self.num_bytes += num_bytes
        return Place(self, num_bytes)

    def _refuse(self, detail: str) -> None:
        self.num_refused += 1
        raise Problem("busy", detail, headers={"retry-after": str(RETRY_AFTER_S)})


class Place:
    """One request's place: it holds ``num_bytes`` until its ``with`` block ends."""

    def __init__(self, admission: Admission, num_bytes: int) -> None:
        self._admission = admission
        self.num_bytes = num_bytes

    def hold(self, num_bytes: int) -> None:
        """Hold ``num_bytes`` in all, if that is more than now; Problem ``busy`` where there is no room."""
        more = num_bytes - self.num_bytes
        if more <= 0:
            return
        admission = self._admission
        if admission.num_bytes + more > admission.max_bytes:
            admission._refuse(
                f"Its {num_bytes:,} bytes would exceed the {admission.max_bytes:,} that are held at once."
            )
        admission.num_bytes += more
        self.num_bytes = num_bytes

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._admission.num_requests -= 1
        self._admission.num_bytes -= self.num_bytes
