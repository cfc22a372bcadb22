"""`pytest -m gpu` selects what runs on a GPU, and nothing where there is none."""

from types import SimpleNamespace

from tests.conftest import mark_gpu


def marked(has_gpu, **params):
    marks = []
    mark_gpu([SimpleNamespace(callspec=SimpleNamespace(params=params), add_marker=marks.append)], has_gpu)
    return [m.name for m in marks]


def test_marks():
    assert marked(True, backend="triton", shape=(2, 3)) == ["gpu"]
    assert marked(True, backend="cpu") == marked(True, name="triton") == []
    assert marked(False, backend="triton") == []
    mark_gpu([SimpleNamespace(nodeid="a test without parameters")], True)
