"""The YAML files in serve/: what Ray Serve and the service read of them, and that nothing in them is misspelt."""

from pathlib import Path

import pytest
import yaml

from rafce_ray.config import ConfigError
from rafce_ray.service.config import read_service_config

FOLDER = Path(__file__).parents[2] / "serve"
FILES = [FOLDER / "local.yaml", FOLDER / "production.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_is_one_that_serve_and_the_service_know(file):
    """Serve's own schema silently accepts misspelt keys of deployments: they are compared with its fields."""
    from ray.serve.schema import DeploymentSchema, ServeDeploySchema

    plain = yaml.safe_load(file.read_text())
    assert plain.keys() <= ServeDeploySchema.model_fields.keys()
    ServeDeploySchema.model_validate(plain)
    (application,) = plain["applications"]
    for deployment in application["deployments"]:
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()
    read_service_config(application["args"])
    with pytest.raises(ConfigError, match="engin: unknown key; did you mean 'engine'"):
        read_service_config({**application["args"], "engin": "torch"})
