"""HAProxy's configuration as it is made safe."""

from pathlib import Path

import pytest

from rafce_ray.serve.haproxy import UnknownConfiguration, mended

WRITTEN = """\
global
    stats socket /run/admin mode 666 level admin
defaults
    mode http
    errorfile 503 /of/ray
frontend prometheus
    bind :9101
frontend http_frontend
    bind *:8000
    use_backend http-rafce
listen stats
    bind *:8404
"""


def test_only_requests_are_taken_from_elsewhere_and_changes_are_asked_once():
    assert mended(WRITTEN, host="0.0.0.0", answers=Path("/answers")).splitlines() == [
        "global",
        "    stats socket /run/admin mode 600 level admin",
        "defaults",
        "    mode http",
        "    timeout http-request 10s",
        "    timeout check 10s",
        "    errorfile 502 /answers/502.http",
        "    errorfile 503 /answers/503.http",
        "    errorfile 504 /answers/504.http",
        "frontend prometheus",
        "    bind 127.0.0.1:9101",
        "frontend http_frontend",
        "    bind 0.0.0.0:8000",
        "    http-request set-header x-forwarded-for %[src]",
        "    http-request disable-l7-retry if { path_beg /v1/admin }",
        "    use_backend http-rafce",
        "listen stats",
        "    bind 127.0.0.1:8404",
    ]


@pytest.mark.parametrize("more", ["frontend other\n    bind *:1\n", "listen stats\n    bind *:8405\n"])
def test_a_configuration_with_other_parts_is_refused(more):
    with pytest.raises(UnknownConfiguration):
        mended(WRITTEN + more, host=None, answers=Path("/answers"))
