"""The service over HTTP, called as a server calls it (ASGI), so that a test decides when a client sends and leaves."""

import asyncio
import io
import json
import threading
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from msdd_fast import accelerate
from msdd_fast.errors import InputError
from msdd_fast.integrations.serve import Settings, create_app, wire
from msdd_fast.layers.request import convert
from tests.perturbed import perturbed

for name in ("fastapi", "fastapi_offline"):
    pytest.importorskip(name, reason=f"needs {name} (the extra [serve])")

WAIT = 20.0


@pytest.fixture(scope="module")
def engine():
    engine = accelerate(perturbed(), dtype=torch.float32, batch_sizes=(1, 4), validate=True)
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def spatial():
    engine = accelerate(perturbed("tiny-ssdd"), dtype=torch.float32, batch_sizes=(1, 2), validate=True)
    engine.warmup()
    return engine


@pytest.fixture(scope="module")
def z(engine):
    return torch.randn(3, *engine.config.latent_shape, generator=torch.Generator().manual_seed(0))


class Client:
    """Calls an application; ``body`` is sent in pieces, and the client leaves when ``leaves`` is set."""

    def __init__(self, app):
        self.app = app

    async def __aenter__(self):
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        return self

    async def __aexit__(self, *error):
        await self._lifespan.__aexit__(*error)

    async def __call__(self, method, path, body=b"", headers=(), leaves=None, cut=False, **query):
        pieces = [body[: len(body) // 2], body[len(body) // 2 :]]
        messages = [{"type": "http.request", "body": p, "more_body": i == 0} for i, p in enumerate(pieces)]
        if cut:
            messages[1] = {"type": "http.disconnect"}
        leaves = leaves or asyncio.Event()
        start, answer = {}, bytearray()

        async def receive():
            if messages:
                return messages.pop(0)
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            start.update(message) if message["type"] == "http.response.start" else answer.extend(message["body"])

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": urlencode(query, doseq=True).encode(),
            "root_path": "",
            "headers": [(n.lower().encode(), v.encode()) for n, v in headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await asyncio.wait_for(self.app(scope, receive, send), WAIT)
        return start["status"], {n.decode(): v.decode() for n, v in start["headers"]}, bytes(answer)


def serve(engine, test, **settings):
    async def run():
        async with Client(create_app(engine, Settings(**settings))) as client:
            return await test(client)

    return asyncio.run(run())


def ask(engine, *args, settings=None, **kwargs):
    """One request; status, headers, body."""
    return serve(engine, lambda client: client("POST", "/decode", *args, **kwargs), **(settings or {}))


def raw(z, **more):
    """Body and parameters as ``diffusers.utils.remote_decode`` sends them."""
    body = z.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"body": body, "shape": list(z.shape), "dtype": str(z.dtype).removeprefix("torch."), **more}


def detail(answer, status):
    assert answer[0] == status, answer
    return json.loads(answer[2])["detail"]


def array(answer):
    assert answer[0] == 200, answer
    return np.asarray(Image.open(io.BytesIO(answer[2])))


def tensor(answer):
    status, headers, body = answer
    assert status == 200, body
    dtype = getattr(torch, headers["dtype"])
    return torch.frombuffer(bytearray(body), dtype=dtype).reshape(json.loads(headers["shape"]))


def pixels(engine, z, seed=0, **options):
    """uint8 (n, H, W, 3), decoded one by one."""
    images = [engine.decode(z[i : i + 1], seed + i, out_dtype=torch.uint8, **options) for i in range(len(z))]
    return torch.cat(images).permute(0, 2, 3, 1).numpy()


# --- What comes back. ---


@pytest.mark.parametrize("form", ["png", "jpg", "jpeg", "webp"])
def test_an_image_file(engine, z, form):
    answer = ask(engine, **raw(z[:1], image_format=form, seed=7))
    media = "jpeg" if form == "jpg" else form
    assert answer[1]["content-type"] == f"image/{media}" and Image.open(io.BytesIO(answer[2])).format == media.upper()
    expected = io.BytesIO()
    Image.fromarray(pixels(engine, z[:1], 7)[0]).save(expected, media, quality=95)
    assert (array(answer) == np.asarray(Image.open(expected))).all()


def test_quality_is_that_of_the_file(engine, z):
    sizes = [len(ask(engine, **raw(z[:1], image_format="jpeg", quality=q))[2]) for q in (10, 95)]
    assert sizes[0] < sizes[1]


def test_raw_images_of_a_whole_request(engine, z):
    """As remote_decode(output_type="pt", partial_postprocess=True) asks: uint8 in the layout of pictures."""
    got = tensor(ask(engine, **raw(z, output_type="pt", partial_postprocess=True, seed=5)))
    assert got.dtype == torch.uint8 and np.abs(got.numpy().astype(int) - pixels(engine, z, 5)).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_raw_floats_have_the_dtype_of_the_latents(engine, z, dtype):
    got = tensor(ask(engine, **raw(z[:1].to(dtype), output_type="pt")))
    wanted = torch.float32 if dtype == torch.float64 else dtype
    expected = convert(engine.decode(z[:1].to(dtype)), wanted)
    assert got.dtype == wanted
    torch.testing.assert_close(got, expected)


def test_latents_as_a_safetensors_file(engine, z):
    expected = pixels(engine, z[:1])[0]
    for name in ("latents", "anything"):
        assert (array(ask(engine, save({name: z[:1].contiguous()}))) == expected).all()
    two = save({"latents": z[:1].contiguous(), "other": torch.zeros(2)})
    assert (array(ask(engine, two)) == expected).all()


def test_shape_and_dtype_as_headers(engine, z):
    body = raw(z[:1])["body"]
    headers = [("shape", json.dumps(list(z[:1].shape))), ("dtype", "float32")]
    assert (array(ask(engine, body, headers)) == pixels(engine, z[:1])[0]).all()
    assert "JSON list" in detail(ask(engine, body, [("shape", "1,2"), ("dtype", "float32")]), 422)


def test_scaling_shift_and_guidance(engine, z):
    got = array(ask(engine, **raw(z[:1], scaling_factor=0.5, shift_factor=0.25, cfg_scale=1.5)))
    assert (got == pixels(engine, z[:1] / 0.5 + 0.25, cfg_scale=1.5)[0]).all()


def test_every_parameter_that_diffusers_sends_is_taken(engine, z):
    size = engine.config.image_size
    more = {"do_scaling": True, "output_type": "pil", "partial_postprocess": False, "height": size, "width": size}
    assert (array(ask(engine, **raw(z[:1], **more))) == pixels(engine, z[:1])[0]).all()
    assert f"height must be {size}" in detail(ask(engine, **raw(z[:1], height=size + 8)), 422)


def test_images_of_any_size(spatial):
    """Requests of two sizes at once: each is decoded, in a batch of its own."""
    latents = [torch.randn(1, 4, h, w, generator=torch.Generator().manual_seed(h)) for h, w in ((8, 8), (4, 6), (8, 8))]

    async def test(client):
        return await asyncio.gather(*(client("POST", "/decode", **raw(z, seed=i)) for i, z in enumerate(latents)))

    for i, answer in enumerate(serve(spatial, test)):
        expected = pixels(spatial, latents[i], i)[0]
        assert array(answer).shape == expected.shape
        assert np.abs(array(answer).astype(int) - expected).max() <= 1


# --- What is refused. ---

SHAPE = [1, 16, 32]  # of the tiny preset
GOOD = np.zeros(SHAPE, np.float32)
BODY = GOOD.tobytes()


@pytest.mark.parametrize(
    ("body", "query", "says"),
    [
        (b"", {}, "not a safetensors file"),
        (b"\xff" * 100, {}, "not a safetensors file"),
        (b"\x08\0\0\0\0\0\0\0{}      ", {}, "one tensor"),
        (save({"a": torch.zeros(1), "b": torch.zeros(1)}), {}, "got 2"),
        (save({"latents": torch.zeros(SHAPE, dtype=torch.int32)}), {}, "latents must be one of"),
        (BODY, {"shape": SHAPE}, "given together"),
        (BODY, {"dtype": "float32"}, "given together"),
        (BODY[:-1], {"shape": SHAPE, "dtype": "float32"}, "must have 2048 bytes"),
        (BODY + b"0", {"shape": SHAPE, "dtype": "float32"}, "must have 2048 bytes"),
        (BODY, {"shape": SHAPE, "dtype": "int64"}, "dtype must be one of"),
        (BODY, {"shape": ["a"], "dtype": "float32"}, "shape"),
        (BODY, {"shape": [-1, 16, 32], "dtype": "float32"}, "shape must be"),
        (b"", {"shape": [0, 16, 32], "dtype": "float32"}, "shape must be"),
        (BODY, {"shape": [1] * 9, "dtype": "float32"}, "shape must be"),
        (BODY, {"shape": [2**62, 2**62], "dtype": "float32"}, "must have"),
        (BODY, {"shape": [1, 32, 16], "dtype": "float32"}, "z must have shape (B, 16, 32), got (1, 32, 16)"),
        (BODY, {"shape": [512], "dtype": "float32"}, "z must have shape"),
        (np.full_like(GOOD, np.nan).tobytes(), {"shape": SHAPE, "dtype": "float32"}, "NaN or Inf"),
        (
            np.full_like(GOOD, 1e30).tobytes(),
            {"shape": SHAPE, "dtype": "float32", "scaling_factor": 1e-30},
            "NaN or Inf",
        ),
        (BODY, {"shape": SHAPE, "dtype": "float32", "scaling_factor": 0}, "scaling_factor"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "shift_factor": "nan"}, "shift_factor"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "seed": -1}, "seed"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "seed": 2**63}, "seed"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "cfg_scale": -1}, "cfg_scale"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "image_format": "gif"}, "image_format"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "output_type": "mp4"}, "output_type"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "quality": 0}, "quality"),
        (BODY, {"shape": SHAPE, "dtype": "float32", "steps": 3}, "steps"),
        (BODY + BODY, {"shape": [2, 16, 32], "dtype": "float32"}, "output_type=pil is for one image, got 2"),
    ],
)
def test_a_bad_request_is_one_line_and_reaches_no_engine(engine, body, query, says):
    async def test(client):
        answer = await client("POST", "/decode", body, **query)
        return answer, (await client("GET", "/metrics"))[2].decode(), client.app.state.service.batcher.waiting

    answer, metrics, waiting = serve(engine, test)
    line = detail(answer, 422)
    assert says in line and "\n" not in line and len(line) < 600
    assert 'requests_total{code="422"} 1' in metrics and "batch_images_count 0" in metrics and waiting == 0


def test_limits_on_size(engine, spatial, z):
    limits = {"max_images": 2}
    assert "1 to 2 images, got 3" in detail(ask(engine, **raw(z, output_type="pt"), settings=limits), 413)
    assert "at most" in detail(ask(engine, b"0" * 200_000, settings={"max_images": 1}), 413)
    head = [("content-length", str(10**12))]
    assert "got 1000000000000" in detail(ask(engine, b"", head), 413)
    large = torch.zeros(1, 4, 16, 8)
    assert "at most 8192 pixels, got 128 x 64" not in detail(
        ask(spatial, **raw(large), settings={"max_pixels": 4096}), 413
    )
    assert array(ask(spatial, **raw(large), settings={"max_pixels": 8192})).shape == (128, 64, 3)


def test_settings_that_make_no_sense(engine):
    for bad in (
        {"max_queue": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"max_wait": -1},
        {"token": ""},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            Settings(**bad)
    assert Settings(max_images=4, max_queue=4).max_images == 4
    with pytest.raises(InputError, match=r"^max_images must be at most max_queue=4, else .*, got 5$"):
        Settings(max_images=5, max_queue=4)
    with pytest.raises(InputError, match="max_pixels must allow the model's 64 x 64"):
        create_app(engine, Settings(max_pixels=100))


def test_a_token(engine, z):
    async def test(client):
        good = raw(z[:1])
        asked = [await client("POST", "/decode", headers=h, **good) for h in ([], [("Authorization", "Bearer no")])]
        bad = await client("POST", "/decode", b"", shape="x")  # who may not ask learns nothing of the parameters
        health, metrics = await client("GET", "/health"), await client("GET", "/metrics")
        allowed = await client("POST", "/decode", headers=[("Authorization", "bearer secret")], **good)
        return [*asked, bad, metrics], health, allowed

    refused, health, allowed = serve(engine, test, token="secret")
    for answer in refused:
        assert "bearer token" in detail(answer, 401) and answer[1]["www-authenticate"] == "Bearer"
    assert health[0] == 200 and allowed[0] == 200


@pytest.mark.parametrize("token", [None, "secret"])
def test_the_description_says_whether_a_token_is_needed(engine, token):
    async def test(client):
        return json.loads((await client("GET", "/openapi.json"))[2])

    described = serve(engine, test, token=token)
    paths, schemes = described["paths"], described.get("components", {}).get("securitySchemes", {})
    assert schemes == ({} if token is None else {"HTTPBearer": {"type": "http", "scheme": "bearer"}})
    needed = {path for path, ways in paths.items() if any("security" in way for way in ways.values())}
    assert needed == (set() if token is None else {"/decode", "/metrics"})


# --- Load, time and people who leave. ---


@pytest.fixture
def held(engine, monkeypatch):
    """The engine waits in ``decode`` until this is set; it counts what it has decoded."""
    free, decode = threading.Event(), type(engine).decode
    engine.begun = engine.decoded = 0

    def slow(z, *args, **kwargs):
        engine.begun += 1
        assert free.wait(WAIT)
        engine.decoded += len(z)
        return decode(engine, z, *args, **kwargs)

    monkeypatch.setattr(engine, "warmup", lambda: None)
    monkeypatch.setattr(engine, "decode", slow)
    return free


async def until(condition):
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def test_a_full_queue_is_503_with_a_time_to_come_again(engine, z, held):
    async def test(client):
        batcher = client.app.state.service.batcher
        first = asyncio.create_task(client("POST", "/decode", **raw(z[:1])))
        await until(lambda: engine.begun == 1)
        waits = [asyncio.create_task(client("POST", "/decode", **raw(z[:1]))) for _ in range(2)]
        await until(lambda: batcher.waiting == 2)
        refused = await client("POST", "/decode", **raw(z[:1]))
        held.set()
        return refused, [await t for t in (first, *waits)]

    refused, answers = serve(engine, test, max_queue=2, max_images=2, max_wait=0)
    assert "queue is full" in detail(refused, 503) and int(refused[1]["retry-after"]) >= 1
    assert [a[0] for a in answers] == [200] * 3


def test_a_request_that_takes_too_long_is_504_and_leaves_the_queue(engine, z, held):
    async def test(client):
        batcher = client.app.state.service.batcher
        answers = await asyncio.gather(*(client("POST", "/decode", **raw(z[:1], cfg_scale=1 + i)) for i in range(2)))
        waiting = batcher.waiting
        held.set()
        return answers, waiting

    answers, waiting = serve(engine, test, timeout=0.2)
    assert all("no images within 0.2 s" in detail(a, 504) for a in answers)
    assert waiting == 0 and engine.decoded == 1  # the one that had begun


def test_a_client_that_leaves_is_taken_out_of_the_queue(engine, z, held):
    async def test(client):
        batcher, leaves = client.app.state.service.batcher, asyncio.Event()
        first = asyncio.create_task(client("POST", "/decode", **raw(z[:1])))
        await until(lambda: engine.begun == 1)
        second = asyncio.create_task(client("POST", "/decode", leaves=leaves, **raw(z[:1])))
        await until(lambda: batcher.waiting == 1)
        leaves.set()
        gone = await second
        waiting = batcher.waiting
        held.set()
        return await first, gone, waiting, (await client("GET", "/metrics"))[2].decode()

    first, gone, waiting, metrics = serve(engine, test, max_wait=0)
    assert first[0] == 200 and gone[0] == 499 and waiting == 0
    assert 'code="499"} 1' in metrics and engine.decoded == 1


def test_a_client_that_leaves_while_it_sends(engine, z):
    async def test(client):
        gone = await client("POST", "/decode", cut=True, **raw(z[:1]))
        return gone, client.app.state.service._reading, await client("POST", "/decode", **raw(z[:1]))

    gone, reading, after = serve(engine, test)
    assert gone[0] == 499 and reading == 0 and after[0] == 200


def test_an_engine_that_fails_is_500_and_others_are_served(engine, z, monkeypatch, caplog):
    decode = type(engine).decode

    def fails(z, seeds, **kwargs):
        if 13 in seeds.tolist():
            raise RuntimeError("out of memory at 0x1234")
        return decode(engine, z, seeds, **kwargs)

    monkeypatch.setattr(engine, "warmup", lambda: None)
    monkeypatch.setattr(engine, "decode", fails)

    async def test(client):
        return await asyncio.gather(*(client("POST", "/decode", **raw(z[:1], seed=s)) for s in (12, 13, 14)))

    answers = serve(engine, test, max_wait=0.2)
    assert [a[0] for a in answers] == [200, 500, 200]
    assert detail(answers[1], 500) == "decoding failed"  # what went wrong is for the log
    assert "0x1234" in caplog.text


def test_images_that_are_not_finite_are_an_error(z, monkeypatch):
    """Latents that pass every check may still decode to NaN."""
    tok = perturbed()
    with torch.no_grad():
        next(p for n, p in tok.decoder.named_parameters() if n.endswith("weight")).fill_(float("inf"))
    engine = accelerate(tok, dtype=torch.float32, batch_sizes=(1,), validate=True)
    monkeypatch.setattr(engine, "warmup", lambda: None)
    assert "finite images" in detail(ask(engine, **raw(z[:1])), 422)


def test_shutting_down_answers_what_was_accepted(engine, z, held):
    async def test():
        app = create_app(engine, Settings(max_wait=0))
        client = Client(app)
        await client.__aenter__()
        tasks = [asyncio.create_task(client("POST", "/decode", **raw(z[:1])))]
        await until(lambda: engine.begun == 1)
        tasks += [asyncio.create_task(client("POST", "/decode", **raw(z[:1]))) for _ in range(5)]
        await until(lambda: app.state.service.batcher.waiting == 5)
        closing = asyncio.create_task(client.__aexit__(None, None, None))
        await until(lambda: not app.state.service.batcher.alive)
        late, health = await client("POST", "/decode", **raw(z[:1])), await client("GET", "/health")
        held.set()
        answers = [await t for t in tasks]
        await closing
        return late, health, answers

    late, health, answers = asyncio.run(test())
    assert [a[0] for a in answers] == [200] * 6
    assert "shutting down" in detail(late, 503) and late[1]["retry-after"] == "1" and health[0] == 503


def test_shutting_down_waits_for_answers_that_are_being_written(engine, z, monkeypatch):
    """In another thread, after the engine has ended."""
    may_end, encode = threading.Event(), wire.Output.encode

    def slowly(output, images):
        assert may_end.wait(60)
        return encode(output, images)

    monkeypatch.setattr(wire.Output, "encode", slowly)

    async def test():
        app = create_app(engine, Settings(max_wait=0))
        client, service = Client(app), app.state.service
        await client.__aenter__()
        tasks = [asyncio.create_task(client("POST", "/decode", **raw(z[:1]))) for _ in range(6)]
        await until(lambda: service._begun == 6 and not service._reading and not service.batcher.waiting)
        closing = asyncio.create_task(client.__aexit__(None, None, None))
        await until(lambda: not service.batcher._thread.is_alive())
        may_end.set()
        answers = [await t for t in tasks]
        await closing
        return answers

    assert [a[0] for a in asyncio.run(test())] == [200] * 6


# --- The rest of it. ---


def test_health_metrics_and_the_description_of_the_api(engine, z):
    async def test(client):
        await client("POST", "/decode", **raw(z, output_type="pt"))
        pages = {p: await client("GET", p) for p in ("/health", "/metrics", "/openapi.json", "/docs")}
        scripts = [w for w in pages["/docs"][2].decode().split('"') if w.endswith((".js", ".css"))]
        return pages, scripts, [(await client("GET", s))[0] for s in scripts]

    pages, scripts, found = serve(engine, test)
    assert all(p[0] == 200 for p in pages.values())
    health = json.loads(pages["/health"][2])
    assert health["status"] == "ok" and health["latents"] == [16, 32]
    assert "msdd_fast_batch_images_sum 3" in pages["/metrics"][2].decode()
    decode = json.loads(pages["/openapi.json"][2])["paths"]["/decode"]["post"]
    assert {"shape", "dtype", "seed", "image_format", "scaling_factor"} <= {p["name"] for p in decode["parameters"]}
    assert {"200", "401", "413", "422", "503", "504"} <= set(decode["responses"])
    assert set(decode["requestBody"]["content"]) == {"application/octet-stream", "application/x-safetensors"}
    assert "cdn" not in pages["/docs"][2].decode() and len(scripts) == 2 and found == [200, 200]
