"""The private parts of Ray Serve that the service uses, each with the reason. Ray may move them in any release.

``tests/serve/test_ray_private.py`` fails when it does; with a release other than the tested one, commands warn first.
HAProxy's configuration, which Ray also writes without a promise, is checked in :mod:`rafce_ray.serve.haproxy`.
"""

from __future__ import annotations

from pathlib import Path

from rafce_ray.train.environment import private_part

with private_part("Ray Serve"):
    from ray.serve._private.application_state import ApplicationStateManager

    # Ray reads these variables once, when it is imported; the environment of the process may say something else by now.
    from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY as USES_HAPROXY
    from ray.serve._private.constants import RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH as MIDDLEWARES
    from ray.serve._private.constants import RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD as HAS_USER_THREAD
    from ray.serve._private.logging_utils import get_serve_logs_dir

__all__ = ["HAS_USER_THREAD", "MIDDLEWARES", "USES_HAPROXY", "logs_folder", "remember_ingress"]


def logs_folder() -> Path:
    """Where the replicas of this node write their logs. No public function of Ray names the folder."""
    return Path(get_serve_logs_dir())


def remember_ingress() -> None:
    """Let Serve's controller keep an application's replicas reachable while it builds the application again.

    Ray calls this once in the controller (``RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH``, set by
    :mod:`rafce_ray.serve.fast_path`). The controller forgets which deployment takes requests as soon as the arguments
    of an application are deployed again, until it has built the application; if the build fails, for good. HAProxy then
    finds no replica, although all of them run: a typo in a YAML file would end the service. So the last known one is
    remembered.
    """
    known: dict[str, str] = {}
    ask = ApplicationStateManager.get_ingress_deployment_name

    def get_ingress_deployment_name(self: ApplicationStateManager, name: str) -> str | None:
        found: str | None = ask(self, name)
        if found is not None:
            known[name] = found
        return known.get(name)

    ApplicationStateManager.get_ingress_deployment_name = get_ingress_deployment_name
