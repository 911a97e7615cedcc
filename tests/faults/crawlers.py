"""`crawlers.py PORT COUNT`: a process that keeps so many slow connections open; it says `ready`, and ends when killed.

A third sends its head slowly, a third its body, a third reads slowly. Who is closed begins again.
"""

import asyncio
import sys
from contextlib import suppress

PREDICT = b"POST /v1/models/tiny-fm:predict HTTP/1.1\r\nhost: here\r\n"
EVERY = 2.0  # seconds between two bytes


async def crawl(port: int, sent: bytes, piece: bytes, opened: asyncio.Semaphore) -> None:
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            opened.release()
            writer.write(sent)
            while not reader.at_eof():
                if piece:
                    writer.write(piece)
                await asyncio.sleep(EVERY)
                if not piece:
                    await reader.read(1)
            writer.close()


async def main(port: int, count: int) -> None:
    opened = asyncio.Semaphore(0)
    reads = b"GET /metrics HTTP/1.1\r\nhost: here\r\n\r\n" * 300
    kinds = [(PREDICT, b"a"), (PREDICT + b"content-length: 1000\r\n\r\n", b" "), (reads, b"")]
    tasks = [asyncio.create_task(crawl(port, *kinds[at % 3], opened)) for at in range(count)]
    for _ in tasks:
        await opened.acquire()
    print("ready", flush=True)
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
