"""A library in a process of its own, seen from the benchmark."""

import json
import os
import subprocess
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from peers.libraries import Library, last_lines
from peers.worker import AUTO, Job

HERE = Path(__file__).resolve().parent
Rate = dict[str, float]  # rows per second of CPU ("cpu") and of the clock ("wall"), peak memory ("mib"), "threads"


class Worker:
    """It waits between two epochs."""

    def __init__(self, library: Library, job: Job) -> None:
        self._name = library.name
        answers, write = os.pipe()
        self._answers, self._said = os.fdopen(answers), tempfile.TemporaryFile("w+")  # noqa: SIM115
        asked = json.dumps(asdict(replace(job, program=library.program, precision=library.precision)))
        others = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        threads = {} if job.threads == AUTO else {"OMP_NUM_THREADS": str(job.threads)}
        self._process = subprocess.Popen(
            [library.python, HERE / library.script, asked, str(write)],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            text=True,
            pass_fds=(write,),
            env={**others, **threads},
        )
        os.close(write)

    def __enter__(self) -> Self:
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input is the end of it
        self._answers.close()
        self._said.close()

    def epoch(self) -> Rate:
        assert self._process.stdin
        self._process.stdin.write("epoch\n")
        self._process.stdin.flush()
        rate: Rate = self._answer()
        return rate

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._said.seek(0)
            raise SystemExit(f"{self._name} failed:\n{last_lines(self._said.read())}")
        return json.loads(line)
