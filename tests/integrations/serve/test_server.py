"""``msdd-fast serve`` as a process: its load test, and how it stops."""

import asyncio
import signal
import socket

import pytest

from msdd_fast import accelerate
from msdd_fast.bench.serving.__main__ import engine_rate, server
from msdd_fast.bench.serving.client import Connection
from msdd_fast.bench.serving.load import misuse, poisson, saturate
from msdd_fast.bench.serving.work import requests
from msdd_fast.commands import main as cli
from tests.perturbed import perturbed

for name in ("fastapi", "fastapi_offline", "uvicorn"):
    pytest.importorskip(name, reason=f"needs {name} (the extra [serve])")


@pytest.fixture(scope="module")
def tokenizer():
    return perturbed()


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "tiny"
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(tokenizer):
    return accelerate(tokenizer, batch_sizes=(4,), validate=True)


@pytest.mark.slow
def test_load_and_misuse(engine, checkpoint):
    work = requests(engine, 8)
    files = requests(engine, 2, image_format="png")
    with server(checkpoint, 4) as (process, url):
        loads = [
            asyncio.run(saturate(url, work + files, 8, 1.0)),
            asyncio.run(poisson(url, work, 20.0, 1.0, 8)),
        ]
        found = asyncio.run(misuse(url, engine, 400, 8, work))
    for load in loads:
        assert load.faults == {} and load.images == len(load.seconds) > 0
        assert load.percentiles() == sorted(load.percentiles())
    assert found["answered_wrongly"] == {} and found["good_requests_lost"] == {} and found["good_requests"] > 0
    assert process.returncode == 0
    assert engine_rate(engine, 4, 0.1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_answers_every_request_that_was_accepted(engine, checkpoint, number):
    """Two images fit into a batch, so most of these wait when the signal comes."""
    work = requests(engine, 8)

    async def test(process, url):
        connections = [Connection(url) for _ in range(40)]
        for c in connections:  # open all of them: what the server has not accepted it may drop
            assert (await c.request("GET", "/health")).status == 200
        asked = [asyncio.create_task(c.request("POST", *work[i % 8][:2])) for i, c in enumerate(connections)]
        while not any(t.done() for t in asked):
            await asyncio.sleep(0)
        process.send_signal(number)
        return [work[i % 8].fault(await t) for i, t in enumerate(asked)]

    with server(checkpoint, 2) as (process, url):
        faults = asyncio.run(test(process, url))
        process.wait(30)
        said = process.stdout.read()
    assert faults == [None] * 40
    assert process.returncode == 0 and said == "stopped\n"


def test_wrong_arguments_are_one_line(checkpoint, capsys, monkeypatch):
    """Before the checkpoint is loaded."""

    def fails(*args):
        assert cli.main(["serve", "--checkpoint", checkpoint, *args]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in fails("--port", str(port))
    assert "--port must be 0 to 65535" in fails("--port", "65536")
    assert "cannot listen on 203.0.113.1 port 0" in fails("--host", "203.0.113.1", "--port", "0")
    assert "timeout must be a finite number" in fails("--timeout", "0")
    monkeypatch.setenv("MSDD_FAST_SERVE_TOKEN", "two\nlines")
    assert "token must be printable" in fails()


def test_without_the_extra_it_says_what_to_install(fresh):
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from msdd_fast.commands.main import main; sys.exit(main(['serve', '--port', '0']))"
    )
    done = fresh(code)
    assert done.returncode == 1 and "pip install 'msdd-fast[serve]'" in done.stderr and done.stderr.count("\n") == 1
