import pytest
from pydantic import BaseModel, ValidationError

from rafce_ray.config import ConfigError, apply_overrides
from rafce_ray.service.config import Limits, ServiceConfig, read_service_config

BUNDLE = {"bundle": "runs/best"}
KEYS = {**BUNDLE, "keys_file": "keys.json"}


def test_a_bundle_is_all_that_is_needed():
    config = read_service_config(BUNDLE)
    assert config.loopback_only
    assert config.keys_file is None
    assert config.limits == Limits()


@pytest.mark.parametrize("model", [ServiceConfig, Limits])
def test_every_field_says_what_it_is(model: type[BaseModel]):
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_it_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        read_service_config(BUNDLE).name = "other"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "bundle, registry: found neither"),
        ({"bundle": "a", "registry": "b"}, "bundle, registry: found both"),
        ({"bundel": "a"}, "bundel: unknown key; did you mean 'bundle'?"),
        (
            {**BUNDLE, "limits": {"max_request": 4}},
            "limits.max_request: unknown key; did you mean 'limits.max_requests'?",
        ),
        ({**BUNDLE, "max_requests": 4}, "did you mean 'limits.max_requests'?"),
        ({**BUNDLE, "engine": "tensorrt"}, "engine: found 'tensorrt'"),
        ({**BUNDLE, "name": "a/b"}, "name: found 'a/b'"),
        ({**BUNDLE, "loopback_only": False}, "loopback_only: found false without keys_file"),
        ({**BUNDLE, "limits": {"deadline_s": 0}}, "limits.deadline_s: found 0;"),
        ({**BUNDLE, "allowed_hosts": ["a.example"]}, "allowed_hosts: found a.example without keys_file"),
        ({**BUNDLE, "allow_origins": ["*"]}, "allow_origins: found * without keys_file"),
        (
            {**KEYS, "allowed_hosts": ["https://a.example"]},
            "allowed_hosts: found 'https://a.example'; give the name alone",
        ),
        ({**KEYS, "allowed_hosts": "a.example:443"}, "allowed_hosts: found 'a.example:443'; give the name alone"),
        ({**KEYS, "allow_origins": ["a.example"]}, "allow_origins: found 'a.example'; give scheme, name and port"),
        ({**KEYS, "allow_origins": ["https://a.example/page"]}, "allow_origins: found 'https://a.example/page'; give"),
        ({**KEYS, "allow_origins": ["null"]}, "allow_origins: found 'null'; give"),
        ({**KEYS, "allow_origin": ["https://a.example"]}, "did you mean 'allow_origins'?"),
        ({**BUNDLE, "limits": {"deadline_s": float("inf")}}, "finite"),
        ({**BUNDLE, "limits": {"max_bytes": 2**20}}, "limits.max_bytes: found 1,048,576"),
        ({**BUNDLE, "threads": True}, "threads: found True; expected a whole number"),
        ({**BUNDLE, "watch_s": True}, "watch_s: found True; expected a number"),
        ({**BUNDLE, "threads": 2**70}, "threads: found 1180591620717411303424; expected a number below 2**63"),
        ({"bundle": ""}, "bundle: found ''; expected text"),
    ],
)
def test_what_cannot_be_meant_is_told(values, said):
    with pytest.raises(ConfigError) as caught:
        read_service_config(values)
    assert said in str(caught.value)


def test_overrides_take_text_as_it_stands():
    given = apply_overrides(BUNDLE, ["bundle=runs/best #2", "name=010", "limits.max_images=010"], ServiceConfig)
    config = read_service_config(given)
    assert (config.bundle, config.name, config.limits.max_images) == ("runs/best #2", "010", 10)
    given = apply_overrides({**BUNDLE, "keys_file": "a"}, ["keys_file=null", "threads=null"], ServiceConfig)
    assert read_service_config(given).keys_file is None


def test_every_fault_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        read_service_config({**BUNDLE, "threads": 0, "watch_s": -1, "typo": 1})
    assert all(name in str(caught.value) for name in ("threads", "watch_s", "typo"))


def test_strangers_are_served_with_keys():
    config = read_service_config({**BUNDLE, "loopback_only": False, "keys_file": "keys.json"})
    assert not config.loopback_only


def test_names_and_origins_are_read_as_people_write_them():
    values = apply_overrides(
        KEYS, ["allowed_hosts=[Faces.Example,'*.b.example']", "allow_origins=HTTPS://App.Example:443/"]
    )
    config = read_service_config(values)
    assert config.allowed_hosts == ("faces.example", "*.b.example")
    assert config.allow_origins == ("https://app.example",)
    assert read_service_config({**BUNDLE, "allow_origins": ["http://localhost:3000"]}).allow_origins


def test_the_decoder_gets_the_limits_of_one_image():
    limits = Limits(max_image_bytes=5000, max_image_side_px=100, max_image_pixels=9000).image_limits()
    assert (limits.max_bytes, limits.max_side_px, limits.max_pixels, limits.min_side_px) == (5000, 100, 9000, 16)
