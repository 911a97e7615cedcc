"""The least a server can do: read the body, answer two bytes. `python null.py <port>`"""

import sys

import uvicorn
from starlette.types import Receive, Scope, Send

HEADERS = [(b"content-length", b"2"), (b"content-type", b"application/json")]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b"{}"})


uvicorn.run(app, port=int(sys.argv[1]), access_log=False, log_level="error", lifespan="off", server_header=False)
