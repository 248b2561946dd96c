import pytest

from helpers.evaluating import make_collections


@pytest.fixture
def collections(tmp_path):
    return make_collections(tmp_path / "data")
