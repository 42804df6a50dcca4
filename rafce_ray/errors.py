"""Errors that are a user's to mend; each names what was found, what was expected, where, and the remedy."""


class RafceError(Exception):
    """The work failed for a reason that the message explains; programs exit with 1.

    ``may_pass``: the same may succeed later, with nothing mended, as after the outage of a storage.
    """

    exit_code = 1
    may_pass = False


class DamagedFile(RafceError):
    """A file of a run or a study cannot be read; the message has its path, the reason and how to go on without it."""


class UsageError(RafceError, ValueError):
    """A command line, configuration or argument cannot be meant as it stands; programs exit with 2."""

    exit_code = 2


class GateError(RafceError):
    """A check said no (data that may not be trained on, for example); programs exit with 3."""

    exit_code = 3
