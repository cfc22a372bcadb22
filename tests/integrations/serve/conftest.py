"""Common to the tests of the service."""

import pytest


@pytest.fixture(autouse=True)
def _with_one_thread(one_thread):
    """Many small decodes."""
