"""Where decodes take latents and seeds only, PiD is refused before any work."""

import pytest

from msdd_fast import accelerate
from msdd_fast.commands import main as cli
from msdd_fast.errors import InputError
from msdd_fast.integrations import export, serve
from msdd_fast.integrations.serve.service import Service
from tests.perturbed import perturbed

REFUSED = r"passes on latents and seeds only; PID also takes text, sigma"


@pytest.fixture(scope="module")
def tok():
    return perturbed("tiny-pid")


def test_the_service(tok):
    with pytest.raises(InputError, match=f"the service {REFUSED}"):
        Service(accelerate(tok), serve.Settings())


def test_exports(tok, tmp_path):
    with pytest.raises(InputError, match=f"an exported decoder {REFUSED}"):
        export.export_decoder(tok, tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_null_text_is_an_option_of_decode(capsys):
    with pytest.raises(SystemExit):
        cli.main(["decode", "--help"])
    assert "--null-text-features" in capsys.readouterr().out
