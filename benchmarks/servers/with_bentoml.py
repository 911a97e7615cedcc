"""BentoML: a process that supervises and one worker, as its command has it. `python with_bentoml.py <port> <bundle>`"""

import os
import sys
from pathlib import Path

import bentoml
from scorer import Scorer

BUNDLE = "BENTOML_BENCHMARK_BUNDLE"


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, traffic={"timeout": 60})  # type: ignore[untyped-decorator]
class Scored:
    def __init__(self) -> None:
        self.scorer = Scorer(os.environ[BUNDLE])

    @bentoml.api  # type: ignore[untyped-decorator]
    async def predict(self, instances: list[dict[str, str]]) -> list[float]:
        return self.scorer.rows(instances)

    @bentoml.api  # type: ignore[untyped-decorator]
    async def ids(self, ids: list[list[int]]) -> list[float]:
        return self.scorer.ids(ids)


if __name__ == "__main__":
    os.environ[BUNDLE] = sys.argv[2]
    os.chdir(Path(__file__).parent)
    command = ["-m", "bentoml", "serve", "with_bentoml:Scored", "--host", "127.0.0.1", "--port", sys.argv[1], "-q"]
    os.execv(sys.executable, [sys.executable, *command])
