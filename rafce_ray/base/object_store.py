"""Requests to an object store: what may pass is asked again, what somebody has to mend is said at once, with its remedy.

pyarrow itself repeats a request that is answered 503, or not at all, 30 times within about 6 s, without a word. What lasts longer is
tried again here, in one place and aloud.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from rafce_ray.base.errors import RafceError

log = logging.getLogger(__name__)

PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Seconds between two tries; with pyarrow's own, an outage of about 45 s is waited for."""

_UNREACHABLE = re.compile(r"NETWORK_CONNECTION|curlCode|Could ?n.t resolve host|\bUNAVAILABLE\b")
_MAY_PASS = re.compile(
    r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|THROTTLING|HTTP status (429|5\d\d)"
    # Of a deletion of many objects pyarrow passes on S3's words alone.
    r"|reduce your request rate|internal error"
    # Google's.
    r"|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED"
)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|Bucket '[^']*' not found|specified bucket does not exist")
_NO_PERMISSION = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN|EXPIRED_TOKEN"
    r"|INVALID_SIGNATURE|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|[Aa]ccess [Dd]enied"
)
_CERTIFICATE = re.compile(r"curlCode: (35|58|59|60|77)\b")
_OTHER_REGION = re.compile("configured region|PERMANENT_REDIRECT|HTTP status 301|AUTHORIZATION_HEADER_MALFORMED")
_CLOCK = re.compile("REQUEST_TIME_TOO_SKEWED")

_has_answered: set[str] = set()
"""Stores that this process has had an answer of: only then is silence an outage, and not a wrong address."""


class StorageError(RafceError, OSError):
    """An object store did not do what it was asked; the message names the place, what was found and the remedy.

    ``why`` is the message without the place.
    """

    def __init__(self, message: str, why: str = "", may_pass: bool = False) -> None:
        super().__init__(message)
        self.why, self.may_pass = why or message, may_pass


def ask(uri: str, request: Callable[[], Answer], *, patient: bool = True) -> Answer:
    """What ``request`` returns, which must do no harm when it is done twice; ``patient``: try again what may pass.

    A store that has never answered this process is not waited for: its address may be wrong.

    Raises:
        FileNotFoundError: as ``request`` raises it.
        StorageError: the store refuses, or does not recover.
    """
    store, pauses = _store_of(uri), iter(PAUSES_S if patient else ())
    while True:
        try:
            answer = request()
        except FileNotFoundError:
            _has_answered.add(store)
            raise
        except StorageError:
            raise
        except OSError as error:
            text = str(error)
            unreachable = _UNREACHABLE.search(text) is not None
            if not unreachable:
                _has_answered.add(store)
            may_pass = unreachable or _MAY_PASS.search(text) is not None
            pause = next(pauses, None)
            if not may_pass or pause is None or store not in _has_answered:
                why = explain(uri, error)
                raise StorageError(f"{uri}: {why}", why, may_pass) from error
            log.warning("%s: %s Trying again in %.0f s.", uri, _what(error), pause)
            time.sleep(pause)
        else:
            _has_answered.add(store)
            return answer


def explain(uri: str, error: OSError) -> str:
    """What is wrong with a storage, with its remedy."""
    text, what = str(error), _what(error)
    scheme, bucket = uri.partition("://")[0], uri.partition("://")[2].partition("?")[0].partition("/")[0]
    if error.errno is not None:
        # A store's errors have no number: this one is of the disk that was copied to or from.
        return f"{what} Make room on this machine's disk, or set TMPDIR to a folder on another."
    if _NO_BUCKET.search(text):
        return no_bucket(bucket)
    if _CLOCK.search(text):
        return f"{what} Set this machine's clock."
    if _NO_PERMISSION.search(text):
        return f"the credentials may not do this: {what} {_credentials(scheme)}"
    if _CERTIFICATE.search(text):
        return f"{what} Add its authority to the machine's certificates, or name it with tls_ca_file_path=FILE in the URI's query."
    if _OTHER_REGION.search(text):
        return f"{what} Name the bucket's region in the URI: s3://{bucket}/...?region=REGION."
    if _UNREACHABLE.search(text):
        return f"no answer: {what} {_address(scheme, uri)}"
    if _MAY_PASS.search(text):
        return f"{what} It did not recover in time: try again later; what was written whole is kept."
    return f"{what} Check the address, the network and the credentials."


def no_bucket(name: str) -> str:
    """That a bucket is missing, with the remedy."""
    return f"there is no bucket {name!r}. Make it, or correct the URI."


def _what(error: OSError) -> str:
    """pyarrow's message as one sentence."""
    text = (error.strerror or str(error)).partition(" error_info=")[0].strip() or type(error).__name__
    # Its first lines may be a heading, as that of a deletion of many objects.
    return " ".join(line.strip() for line in text.splitlines()[:2]).rstrip(".") + "."


def _credentials(scheme: str) -> str:
    """Which credentials were used, and how to give others. No secret is told, and of a key's name its beginning."""
    if scheme != "s3":
        found = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        used = (
            f"Used were those of GOOGLE_APPLICATION_CREDENTIALS={found}"
            if found
            else "Used were the machine's own, if any"
        )
        return f"{used}. Set GOOGLE_APPLICATION_CREDENTIALS to the file of an account that may read, write and delete there."
    key, profile = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_PROFILE")
    file = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    if key:
        used = f"Used was AWS_ACCESS_KEY_ID={key[:4]}…"
    elif file.is_file():
        used = f"Used was the profile {profile or 'default'!r} of {file}"
    else:
        used = f"There are none: AWS_ACCESS_KEY_ID is not set and there is no {file}, so at most the machine's role was used"
    return (
        f"{used}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the machine's role) to credentials that may read, "
        "write and delete there."
    )


def _address(scheme: str, uri: str) -> str:
    """Where was asked, and where that is said."""
    if "endpoint_override=" in uri:
        return "Check endpoint_override and scheme in the URI, and the network."
    variable = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)), None)
    if scheme == "s3" and variable is not None:
        return f"Check {variable}={os.environ[variable]} and the network."
    if scheme == "s3":
        return (
            "Check the network; a store other than Amazon's is named in the URI's query (endpoint_override=HOST:PORT&scheme=http) or by "
            "AWS_ENDPOINT_URL."
        )
    return "Check the network and GOOGLE_APPLICATION_CREDENTIALS."


def _store_of(uri: str) -> str:
    base, _, query = uri.partition("?")
    return f"{base.partition('://')[2].partition('/')[0]}?{query}"
