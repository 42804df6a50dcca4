"""Ray Serve's private parts are where rafce_ray/serve/ray_private.py looks for them, and do what it needs of them."""

from ray.serve._private.application_state import ApplicationStateManager
from ray.serve._private.controller import ServeController

from rafce_ray.serve import ray_private


def test_the_controller_asks_for_an_applications_ingress_by_its_name():
    """HAProxy's targets come from this method; a controller that asks another one would forget the ingress again."""
    asking = [name for name, member in vars(ServeController).items() if asks_for_ingress(member)]
    assert len(asking) >= 3, asking


def asks_for_ingress(member: object) -> bool:
    return "get_ingress_deployment_name" in getattr(getattr(member, "__code__", None), "co_names", ())


def test_the_last_known_ingress_is_remembered_while_an_application_is_built_again(monkeypatch):
    answers = {"rafce": "FaceService"}
    monkeypatch.setattr(ApplicationStateManager, "get_ingress_deployment_name", lambda self, name: answers.get(name))
    ray_private.remember_ingress()
    manager = ApplicationStateManager.__new__(ApplicationStateManager)
    assert manager.get_ingress_deployment_name("rafce") == "FaceService"
    answers.clear()
    assert manager.get_ingress_deployment_name("rafce") == "FaceService"
    assert manager.get_ingress_deployment_name("another") is None


def test_ray_says_whether_it_uses_haproxy_a_thread_for_the_application_and_middlewares():
    assert isinstance(ray_private.USES_HAPROXY, bool)
    assert isinstance(ray_private.HAS_USER_THREAD, bool)
    assert isinstance(ray_private.MIDDLEWARES, str | None)
