"""A study's folder in the real layout with figures that a test chooses, written in milliseconds."""

import pytest
from studies import SyntheticStudy


@pytest.fixture(scope="session")
def new_study(tmp_path_factory):
    """``new_study(**settings)``: an empty :class:`SyntheticStudy` in a folder of its own."""
    return lambda name="sweep", **settings: SyntheticStudy(tmp_path_factory.mktemp("study") / name, **settings)
