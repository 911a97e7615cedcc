"""Ray Serve: a proxy, one replica, and the processes of Ray. `python with_ray.py <port> <bundle>`"""

import sys
from typing import Any

import ray
from ray import serve
from scorer import Scorer
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=100)
class Scored:
    def __init__(self, path: str) -> None:
        self.scorer = Scorer(path)

    async def __call__(self, request: Request) -> dict[str, Any]:
        asked = await request.json()
        return {
            "predictions": self.scorer.ids(asked["ids"]) if "ids" in asked else self.scorer.rows(asked["instances"])
        }


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
quiet = {"enable_access_log": False, "log_level": "ERROR"}
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config=quiet)
serve.run(Scored.bind(sys.argv[2]), route_prefix="/predict", logging_config=quiet, blocking=True)
