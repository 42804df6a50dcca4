"""What Ray calls once in Serve's controller (``RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH``, set by :mod:`rafce_ray.serve.fast_path`).

Serve's controller forgets which deployment of an application takes requests as soon as the application's arguments are
deployed anew, until it has built it; where that fails, for good. HAProxy then finds no replica, although all of them
run: a typo in a YAML file would end the service. The last one known is remembered here.
"""

from __future__ import annotations

from ray.serve._private.application_state import ApplicationStateManager


def remember_ingress() -> None:
    """Let the controller go on with an application's replicas while it is built again."""
    known: dict[str, str] = {}
    ask = ApplicationStateManager.get_ingress_deployment_name

    def get_ingress_deployment_name(self: ApplicationStateManager, name: str) -> str | None:
        found: str | None = ask(self, name)
        if found is not None:
            known[name] = found
        return known.get(name)

    ApplicationStateManager.get_ingress_deployment_name = get_ingress_deployment_name
