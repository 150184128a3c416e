"""A price feed over TCP that hangs up and falls silent, and a shared source that survives it.

python examples/reconnecting_feed.py [--backend asyncio|trio]
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncGenerator
from contextlib import suppress
from itertools import count, cycle, islice
from typing import NamedTuple

import anyio
import structlog
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from anyio_sharedstream import Fold, Gap, Restart, SharedStreamManager, Snapshot, Subscription, UpstreamSilent, shared_source

LOST = OSError, anyio.BrokenResourceError, anyio.IncompleteRead, UpstreamSilent


class Tick(NamedTuple):
    symbol: str
    price: int


def newest(prices: dict[str, int], tick: Tick) -> dict[str, int]:
    """The newest price of each symbol: in a new dictionary, for others still hold the one before."""
    return {**prices, tick.symbol: tick.price}


@shared_source(
    restart=Restart(initial_delay=0.05, max_delay=5.0, on=LOST),  # other errors, such as a line that is no price, are final
    silence_timeout=1.0,  # a connection on which nothing comes for so long is lost as well
    close_timeout=1.0,  # and closing it keeps the next one waiting for no longer than this
    linger=5.0,  # the connection outlives its last subscriber: who comes back soon finds it as it was
    replay=5,  # who comes late first receives what came just before
    fold=Fold(dict, newest),  # or, with snapshot=True, what everything so far comes to, from dict() on
)
async def prices(port: int) -> AsyncGenerator[Tick, None]:
    """How to connect and how to read, and no more: this runs once for everybody, and again after a failure."""
    async with await anyio.connect_tcp("127.0.0.1", port) as connection:
        lines = BufferedByteReceiveStream(connection)
        while True:
            symbol, price = (await lines.receive_until(b"\n", max_bytes=100)).decode().split()
            yield Tick(symbol, int(price))


class Server:
    """Sends one price after the other; it hangs up on its first two clients, falls silent on the third, and then is well."""

    def __init__(self) -> None:
        self.connections = 0
        self._prices = zip(cycle(["EUR", "USD", "JPY"]), count(1))

    async def talk(self, connection: SocketStream) -> None:
        self.connections += 1
        print(f"server: connection {self.connections}")
        async with connection:
            with suppress(anyio.BrokenResourceError, anyio.EndOfStream):  # the client has gone
                for symbol, price in islice(self._prices, 4 if self.connections <= 3 else None):
                    await connection.send(f"{symbol} {price}\n".encode())
                    await anyio.sleep(0.02)
                if self.connections == 3:
                    await connection.receive()  # which sends nothing, and goes when it has had enough


def show(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Print the states of the feed, which are log lines, and why it fails."""
    reason = f": {line['exc_info']!r}; again in {line['restart_in']:.2f} seconds" if "restart_in" in line else ""
    print(f"feed: {line['event'].removeprefix('group ')}{reason}")
    raise structlog.DropEvent


async def follow(stream: Subscription[Tick | Gap], until: int) -> None:
    """Take everything, and know where something may be missing."""
    received: list[int] = []
    async for item in stream:
        if isinstance(item, Gap):
            print(f"follower: a gap after {len(received)} prices, because of a {item.cause}")
        else:
            received.append(item.price)
            if item.price >= until:
                break
    print(f"follower: {received}")


async def watch(stream: Subscription[Tick | Snapshot[dict[str, int]]], until: int) -> None:
    """Know the newest price of each symbol: first a state, then what changes it; a state again where the feed begins anew."""
    async with stream:
        async for item in stream:
            if isinstance(item, Snapshot):
                print(f"dashboard: begins with {item.state}")
                known = item.state
            else:
                known = newest(known, item)
                if item.price >= until:
                    break
    print(f"dashboard: ends with {known}")


async def visit(manager: SharedStreamManager, port: int, until: int) -> None:
    """One follows and one watches until such a price, one comes late, and then all have left."""
    async with manager.subscribe(prices(port), gaps=True) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(watch, manager.subscribe(prices(port), snapshot=True), until)
        await follow(stream, until)
        async with manager.subscribe(prices(port)) as late:
            replayed = [tick.price for tick in await late.receive_batch(5)]
            print(f"latecomer: {replayed} at once, and then {(await late.receive()).price}")


async def main() -> None:
    server = Server()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    port = listener.extra(SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, server.talk)
        async with SharedStreamManager(logger=structlog.wrap_logger(None, processors=[show])) as manager:
            await visit(manager, port, until=20)
            print("everybody has left")
            await anyio.sleep(0.1)
            print("everybody comes back")
            await visit(manager, port, until=40)
        tasks.cancel_scope.cancel()
    print(f"the server saw {server.connections} connections")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A source that survives its upstream.")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    anyio.run(main, backend=parser.parse_args().backend)
