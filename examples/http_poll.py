"""One poller of a JSON endpoint for any number of consumers; it asks only for what has changed (ETag, If-None-Match).

python examples/http_poll.py [--backend asyncio|trio]      polls a server of its own on the loopback interface
python examples/http_poll.py --url URL [--interval S]      polls another until interrupted
"""

from __future__ import annotations

import argparse
import math
from collections.abc import AsyncGenerator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import anyio
import httpx2

from anyio_sharedstream import SharedStreamManager, shared_source


@shared_source
async def documents(url: str, interval: float) -> AsyncGenerator[Any, None]:
    """What is at *url*, now and whenever it has changed."""
    etag = ""
    async with httpx2.AsyncClient(mounts={"all://127.0.0.1": None}) as client:  # no proxy for the loopback interface
        while True:
            response = await client.get(url, headers={"If-None-Match": etag} if etag else {})
            if response.status_code != 304:
                etag = response.raise_for_status().headers.get("ETag", "")
                yield response.json()
            await anyio.sleep(interval)


async def poll(url: str, interval: float, consumers: int, last: float) -> None:
    """Run so many consumers until the document is a number as large as *last*; the first of them prints."""

    async def consume(number: int) -> None:
        async with manager.subscribe(documents(url, interval)) as stream:
            async for document in stream:
                if number == 1:
                    print(f"consumer 1 of {consumers}: {document}", flush=True)
                if document == last:
                    break

    async with SharedStreamManager() as manager, anyio.create_task_group() as tasks:
        for number in range(1, consumers + 1):
            tasks.start_soon(consume, number)


class Handler(BaseHTTPRequestHandler):
    """Serves a number that grows with every second request, so whoever polls it makes five until it has seen 0, 1 and 2."""

    protocol_version = "HTTP/1.1"
    statuses: list[int] = []  # noqa: RUF012 - one list for all answers: every connection has a handler of its own

    def do_GET(self) -> None:
        body = str(len(self.statuses) // 2)
        changed = self.headers["If-None-Match"] != f'"{body}"'
        self.statuses.append(200 if changed else 304)
        self.send_response(self.statuses[-1])
        self.send_header("ETag", f'"{body}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode() if changed else b"")

    def log_message(self, *_: object) -> None:
        """Write no line per request."""


def main(backend: str, url: str | None, interval: float) -> None:
    if url is not None:
        anyio.run(poll, url, interval, 3, math.nan, backend=backend)  # nothing equals nan: until interrupted
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        for consumers in (1, 10, 100):
            Handler.statuses.clear()
            anyio.run(poll, f"http://127.0.0.1:{server.server_port}", interval, consumers, 2, backend=backend)
            print(f"the server counted {len(Handler.statuses)} requests, {Handler.statuses.count(304)} answered 304 Not Modified")
        server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One HTTP poller, many consumers.")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--url", help="poll this until interrupted; it must answer with JSON")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between requests")
    try:
        main(**vars(parser.parse_args()))
    except* KeyboardInterrupt:
        print("interrupted")
