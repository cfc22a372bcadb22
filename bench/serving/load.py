"""Requests at a server: as many as it takes, at random times, or bad ones."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msdd_fast.bench.serving.client import Connection
from msdd_fast.bench.serving.work import Request, bad_requests
from msdd_fast.engine import FastDecoder

PERCENTILES = (50, 95, 99)


@dataclass
class Load:
    """What a load test saw: seconds of each good answer, the whole time, and what went wrong how often."""

    seconds: list[float] = field(default_factory=list)
    images: int = 0
    elapsed: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.elapsed

    def percentiles(self) -> list[float]:
        """Milliseconds."""
        points = statistics.quantiles(self.seconds, n=100, method="inclusive")
        return [1e3 * points[p - 1] for p in PERCENTILES]


async def _ask(connection: Connection, request: Request, load: Load) -> None:
    begin = time.perf_counter()
    try:
        response = await connection.request("POST", request.target, request.body)
    except (OSError, EOFError) as e:
        load.faults[f"connection: {type(e).__name__}"] += 1
        return
    seconds = time.perf_counter() - begin
    fault = request.fault(response)
    if fault is not None:
        load.faults[fault] += 1
        return
    load.seconds.append(seconds)
    load.images += len(request.images)


async def saturate(url: str, work: Sequence[Request], connections: int, seconds: float) -> Load:
    """Closed loop: every connection sends its next request when the last one is answered."""
    load = Load()
    todo = itertools.cycle(work)
    begin = time.perf_counter()

    async def one() -> None:
        connection = Connection(url)
        while time.perf_counter() - begin < seconds:
            await _ask(connection, next(todo), load)
        connection.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    load.elapsed = time.perf_counter() - begin
    return load


async def poisson(url: str, work: Sequence[Request], rate: float, seconds: float, connections: int) -> Load:
    """Open loop: requests at random times, ``rate`` a second, that wait for a free connection if there is none.

    The time of a request counts from when it was due, also if it had to wait.
    """
    load, rng = Load(), random.Random(0)
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(Connection(url))

    async def one(request: Request) -> None:
        due = time.perf_counter()
        connection = await free.get()
        waited = time.perf_counter() - due
        before = len(load.seconds)
        await _ask(connection, request, load)
        if len(load.seconds) > before:
            load.seconds[-1] += waited
        free.put_nowait(connection)

    begin = time.perf_counter()
    due, tasks, todo = begin, [], itertools.cycle(work)
    while due - begin < seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(next(todo))))
        due += rng.expovariate(rate)
    await asyncio.gather(*tasks)
    load.elapsed = time.perf_counter() - begin
    return load


async def misuse(
    url: str, engine: FastDecoder, count: int, connections: int, work: Sequence[Request]
) -> dict[str, Any]:
    """``count`` bad requests, while four connections go on with good ones; what was answered wrongly."""
    bad = itertools.islice(bad_requests(engine), count)
    wrong: Counter[str] = Counter()
    good, done = Load(), asyncio.Event()
    todo = itertools.cycle(work)
    begin = time.perf_counter()

    async def one_good() -> None:
        connection = Connection(url)
        while not done.is_set():
            await _ask(connection, next(todo), good)
        connection.close()

    async def one_bad() -> None:
        connection = Connection(url)
        for name, target, body, status in bad:
            if not status:
                await connection.send("POST", target, body[: len(body) // 2], {"Content-Length": str(len(body))})
                connection.close()
                continue
            response = await connection.request("POST", target, body)
            if response.status != status:
                wrong[f"{name}: {response.status} instead of {status}"] += 1
        connection.close()

    users = [asyncio.create_task(one_good()) for _ in range(4)]
    await asyncio.gather(*(one_bad() for _ in range(connections)))
    done.set()
    await asyncio.gather(*users)
    good.elapsed = time.perf_counter() - begin
    return {
        "bad_requests": count,
        "answered_wrongly": dict(wrong),
        "good_requests": len(good.seconds),
        "good_requests_lost": dict(good.faults),
        "seconds": good.elapsed,
    }
