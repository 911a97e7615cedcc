"""`crawlers.py PORT COUNT`: a process that keeps so many slow connections open; it says `ready`, and ends when killed.

A third sends its head slowly, a third its body, a third reads slowly. Who is closed begins again.
"""

import asyncio
import sys
from contextlib import suppress

PREDICT = b"POST /v1/models/tiny-fm:predict HTTP/1.1\r\nhost: here\r\n"
EVERY = 2.0  # seconds between two bytes
BEGIN = 5.0  # seconds over which they begin, so that those that are closed begin again at different moments


async def crawl(port: int, sent: bytes, piece: bytes, opened: asyncio.Semaphore, after: float) -> None:
    await asyncio.sleep(after)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened.release()
            writer.write(sent)
            closed = asyncio.create_task(_closed(reader, 1000 if piece else 1))
            while not closed.done():
                await asyncio.wait([closed], timeout=EVERY)
                writer.write(piece)
            writer.close()


async def _closed(reader: asyncio.StreamReader, count: int) -> None:
    """Read so many bytes at once until there are no more."""
    while await reader.read(count):
        await asyncio.sleep(EVERY)


async def main(port: int, count: int) -> None:
    opened = asyncio.Semaphore(0)
    reads = b"GET /v1/models/tiny-fm HTTP/1.1\r\nhost: here\r\n\r\n"
    kinds = [(PREDICT, b"a"), (PREDICT + b"content-length: 1000\r\n\r\n", b" "), (reads, b"")]
    tasks = [asyncio.create_task(crawl(port, *kinds[at % 3], opened, BEGIN * at / count)) for at in range(count)]
    for _ in tasks:
        await opened.acquire()
    print("ready", flush=True)
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
