"""Optional packages: what is said of those that are missing or broken, and torchvision beside any build of PyTorch."""

import sys

import pytest

from msdd_fast.errors import InputError
from msdd_fast.io import packages
from msdd_fast.io.packages import import_package, optional


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Modules of a test, which are forgotten after it."""
    monkeypatch.setattr(packages, "_import_torchvision", lambda: None)
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def module(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)

    yield module
    for name in written:
        sys.modules.pop(name, None)


def test_missing(write):
    with pytest.raises(InputError, match=r"x is not installed \(No module named .*: pip install 'msdd-fast\[eval\]'"):
        import_package("msdd_fast_no_such_module", "x", "eval")
    write("msdd_fast_needy", "import msdd_fast_no_such_module")
    with (
        pytest.raises(InputError, match=r"x is not installed .*: pip install 'msdd-fast\[pid\]'"),
        optional("x", "pid"),
    ):
        import msdd_fast_needy  # noqa: F401


def test_broken(write):
    write("msdd_fast_broken", "raise OSError('no libfoo')")
    with pytest.raises(InputError, match=r"^x is installed but does not import: OSError: no libfoo$"):
        import_package("msdd_fast_broken", "x", "eval")


def test_broken_and_wrapped(write):
    """As diffusers and transformers wrap it, which import their modules late."""
    write("msdd_fast_broken", "raise OSError('no libfoo')")
    write(
        "msdd_fast_lazy",
        "try:\n    import msdd_fast_broken\nexcept OSError as e:\n    raise ModuleNotFoundError('look above') from e\n",
    )
    with pytest.raises(InputError, match=r"^x is installed but does not import: OSError: no libfoo$"):
        import_package("msdd_fast_lazy", "x", "eval")


# What torchvision does while it is imported, where its compiled part does not load.
BESIDE_ANOTHER_BUILD = """
import torch
for name in ("nms", "qnms"):
    torch.library.register_fake("torchvision::" + name)(lambda dets, scores, iou_threshold: dets)
"""


@pytest.mark.parametrize(
    ("body", "torchvision"), [(BESIDE_ANOTHER_BUILD, True), ("raise RuntimeError('no libfoo')", False)]
)
def test_torchvision(fresh, tmp_path, body, torchvision):
    """Built for another PyTorch it is imported; broken otherwise, a package that does without it is imported."""
    (tmp_path / "torchvision.py").write_text(body)
    code = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "from msdd_fast.io.packages import optional\n"
        "for _ in range(2):\n    with optional('x', 'eval'):\n        import json\n"
        "print('torchvision' in sys.modules)"
    )
    assert fresh(code, check=True).stdout == f"{torchvision}\n"


def test_nothing_imports_torchvision_by_itself(fresh):
    """It takes seconds, and needs the shim where PyTorch is built for CPUs."""
    code = (
        "import sys, msdd_fast.metrics, msdd_fast.commands.evaluation.evaluate; sys.exit('torchvision' in sys.modules)"
    )
    assert fresh(code).returncode == 0
