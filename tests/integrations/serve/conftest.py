"""Common to the tests of the service."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Of PyTorch: these are many small decodes, and threads that wait for each other take most of their time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
