"""A model with attention, for all tests of this folder."""

from typing import Any

import pytest

from tests import hub
from tests.vqgans import ATTENTION


@pytest.fixture(scope="session")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hub.make_vqmodel(tmp_path_factory.mktemp("models") / "attending", **ATTENTION)
