"""`python -m service.trial`: opens bundles as the service does, so that one that crashes or eats memory ends no other
process than this. `service.trials` starts it.

One line of JSON comes on stdin, and stays open: when it is closed, whoever asked is no more. A line goes to stdout when
this process is ready, and one after each bundle.
"""

import faulthandler
import os
import resource
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

import msgspec

from bundle import BundleError, Encoder, session
from bundle.device import Gpu
from service import memory, runtime
from service.catalog import check_place, refused
from service.messages import Instance
from service.metrics import Metrics
from service.runtime import CANDIDATES_PER_RUN, Runtime
from service.trials import Order, Ready, Verdict

OOM_SCORE = Path("/proc/self/oom_score_adj")
SLACK = 256 * 2**20  # over what is free: that there is no room is said of what a bundle took, not of where it failed


def main() -> None:
    faulthandler.enable()
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    said = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints is no verdict
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit(order)
    with suppress(Exception):  # a trial says why it cannot be
        session.library()
    said.write(msgspec.json.encode(Ready()) + b"\n")
    for path, digest in order.bundles:
        said.write(msgspec.json.encode(_try(Path(path), digest, order)) + b"\n")


def _try(path: Path, digest: str, order: Order) -> Verdict:
    before, cache = memory.own_bytes(), order.tensorrt_cache
    try:
        loaded = runtime.load(
            path,
            provider=order.provider,
            threads=order.threads,
            metrics=Metrics(),
            trusted_keys=order.trusted_keys,
            gpu=Gpu(order.device, order.tf32, order.cuda_graphs, Path(cache) if cache else None),
        )
        check_place(loaded, path, digest)
        _exercise(loaded)
    except Exception as error:
        return Verdict(
            refused(error, digest, order.provider),
            said="" if isinstance(error, BundleError) else traceback.format_exc(),
        )
    return Verdict(None, grown=max(memory.own_bytes() - before, 0))


def _exercise(loaded: Runtime) -> None:
    """Run what `load` has not: single rows, and rankings of as many candidates as serving gives a run."""
    golden = loaded.predictor.bundle.golden_rows
    loaded.logits(loaded.encoder.rows(golden[:1]))
    loaded.explain(golden, loaded.encoder.rows(golden), top_k=10)
    if loaded.ranking:
        context, candidates = loaded.ranking.of_context, loaded.ranking.of_candidate
        items = [_only(row, candidates) for row in golden] * (CANDIDATES_PER_RUN // len(golden) + 1)
        loaded.rank(context.rows([_only(golden[0], context)]), candidates.rows(items[:CANDIDATES_PER_RUN]))


def _only(row: Instance, encoder: Encoder) -> Instance:
    return {name: row[name] for name in encoder.names if name in row}


def _limit(order: Order) -> None:
    """Take no more memory and time than was given; where memory runs short nevertheless, let the kernel end this."""
    os.nice(10)
    with suppress(OSError):
        OOM_SCORE.write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if order.bytes is not None:
        limit = memory.data_bytes() + order.bytes + SLACK
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    cpu = int(order.seconds * len(order.bundles) * order.threads) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
