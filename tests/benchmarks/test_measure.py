"""The arithmetic of the benchmark of the service, its load against a real server, and its installer's words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import growth
from benchmarks.measure import environments, load, plan, report, requests
from benchmarks.measure.bars import Bar, Bars
from benchmarks.measure.environments import NotInstalled
from benchmarks.measure.load import Broken
from benchmarks.measure.rounds import Figures, Round, by_turns, median, timed
from benchmarks.measure.servers import CORES, SCRIPTS, Failed, serving

OURS, PEER, GONE = ("t", "ours"), ("t", "peer"), ("t", "gone")


def a_round(cpu_us: float, *, per_second: float = 100, p50: float = 1, p99: float = 2, left: float = 1) -> Round:
    return Round(per_second, cpu_us, p50, p99, left)


@pytest.fixture
def bars() -> Bars:
    ours = a_round(50, per_second=900, p50=2, p99=6, left=1.5)
    peer = a_round(200, per_second=400, p50=4, p99=8, left=1.0)
    return Bars(Figures({OURS: ours, PEER: peer}, {"gone": "no wheel"}))


def test_a_median_is_taken_value_by_value() -> None:
    assert median([Round(1, 9, 5, 7, 1), Round(3, 7, 6, 1, 2), Round(2, 8, 40, 2, 3)]) == Round(2, 8, 6, 2, 2)


def test_ratios(bars: Bars) -> None:
    assert bars.times("", 4, of=OURS, over=PEER).found == 4.0
    assert bars.cost("", 1.5, of=PEER, over=OURS).found == 4.0
    assert bars.above("", 40, of=OURS, floor_us=8).found == 42.0
    assert bars.spread("", 1.5, of=OURS, over=PEER).found == 3 / 2
    scaled = bars.scaling("two over one", 1.7, of=OURS, over=PEER)
    assert (scaled.text, scaled.found) == ("two over one (1.50 and 1.00)", 2 * (900 / 1.5) / (400 / 1.0))


def test_met_and_missed(bars: Bars) -> None:
    assert bars.times("", 4, of=OURS, over=PEER).verdict == "met"
    assert bars.times("", 4.01, of=OURS, over=PEER).verdict == "missed"
    assert bars.cost("", 4, of=PEER, over=OURS).verdict == "met"
    assert bars.cost("", 3.99, of=PEER, over=OURS).verdict == "missed"
    gone = [bars.times("", 4, of=OURS, over=GONE), bars.above("", 1, of=GONE, floor_us=0)]
    gone.append(bars.scaling("", 2, of=GONE, over=OURS))
    assert {bar.verdict for bar in gone} == {"not measured: gone: no wheel"}


def test_the_quickest_is_the_one_held_against_us(bars: Bars) -> None:
    assert bars.quickest(PEER, GONE, OURS) == OURS
    assert bars.quickest(PEER, GONE) == PEER
    assert bars.quickest(GONE, ("t", "neither")) == GONE


def ranked(costs: dict[str, float]) -> list[Bar]:
    names = (plan.RANK_COLUMNS, plan.RANK, plan.PREDICT, plan.FASTAPI)
    medians = {(plan.ranking(key), name): a_round(costs[name]) for key in plan.RANKED for name in names}
    found = plan.promises(Bars(Figures(medians, {})), bare_us=10)
    return [bar for bar in found if ":predict" in bar.text]


def test_a_ranking_is_held_to_columns_and_says_rows() -> None:
    costs = {plan.RANK_COLUMNS: 100.0, plan.RANK: 160.0, plan.PREDICT: 480.0, plan.FASTAPI: 1200.0}
    nfm, *others = ranked(costs)
    assert nfm.text == "rank 1 × 1,000, nfm, columns over FastAPI's :predict (rows: 7.5×)"
    assert (nfm.found, nfm.verdict) == (12.0, "met")
    assert [(bar.limit, bar.found, bar.verdict) for bar in others] == [
        (5, 4.8, "missed"),
        (15, 12.0, "missed"),
        (5, 4.8, "missed"),
        (10, 12.0, "met"),
        (5, 4.8, "missed"),
    ]


def test_the_slow_are_asked_for_one_instance_only() -> None:
    assert {line.server for line in plan.RAW} - {line.server for line in plan.quick(plan.RAW)} == {*plan.SLOW}


def test_a_bar_in_words() -> None:
    bar = Bar("one, over the other", 2.345, 4)
    assert report.of_bars([bar]).splitlines()[-1] == "| one, over the other | ≥ 4× | 2.35× | missed |"
    assert Bar("", 1234.5, 150, at_least=False, unit=" µs").measured == "1,234 µs"


def test_a_table_is_relative_to_its_first_line() -> None:
    *_, last = report.of_rounds({"ours": a_round(50), "peer": a_round(125)}).splitlines()
    assert last == "| peer | 100 | 125 | 1.00 | 2.00 | 2.50 |"


def test_the_first_round_warms_and_what_breaks_is_left_out() -> None:
    costs, absent = iter([99, 1, 2]), dict[str, str]()

    def breaks() -> Round:
        raise Broken("closed a connection")

    found = by_turns({OURS: lambda: a_round(next(costs)), GONE: breaks}, rounds=2, absent=absent)
    assert {key: [each.cpu_us for each in kept] for key, kept in found.items()} == {OURS: [1, 2]}
    assert absent == {"gone": "t: it closed a connection"}


def test_a_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    report.write_block(page, "a", "new")
    assert page.read_text() == "before\n<!-- a: begin -->\n\nnew\n\n<!-- a: end -->\nafter\n"
    with pytest.raises(SystemExit, match="<!-- b: begin -->"):
        report.write_block(page, "b", "new")


def test_a_line_is_found() -> None:
    points = {1: 53.0, 10: 80.0, 1000: 3050.0}
    line = growth.fitted(points)
    assert line == pytest.approx((50, 3))
    assert growth.furthest(points | {100: 385.0}, line) == pytest.approx(0.1)


def test_binary_ids_lie_behind_their_json() -> None:
    ids = np.arange(6).reshape(2, 3)
    request = requests.ids_binary("/infer", ids)
    assert request.json_bytes is not None
    head = json.loads(request.body[: request.json_bytes])
    assert head["inputs"][0]["parameters"]["binary_data_size"] == 48
    np.testing.assert_array_equal(np.frombuffer(request.body[request.json_bytes :], "<i8"), ids.ravel())


def test_the_installers_words_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installer = tmp_path / "installer"
    installer.write_text("#!/bin/sh\necho no room left >&2\nexit 3\n")
    installer.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(installer))
    with pytest.raises(NotInstalled, match="no room left"):
        environments.python(environments.PEERS[0], tmp_path)


ONE = requests.instances("/", requests.draw(1))
SLOW = """
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answered = 0

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(0.05)
        Handler.answered += 1
        self.send_response(200 if Handler.answered < 12 else 500)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"2\\r\\n{}\\r\\n0\\r\\n\\r\\n")

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def test_the_load_and_the_time_of_a_server() -> None:
    with serving("null", [str(SCRIPTS / "null.py"), "{port}"], ONE) as server:
        found = timed(server, lambda: load.closed(server.port, ONE, connections=4, seconds=1))
        assert found.per_second > 100
        assert 1 < found.cpu_us < 1e6 / found.per_second
        assert 0 < found.p50_ms <= found.p99_ms < 1000
        opened = load.opened(server.port, ONE, rate=200, connections=4, seconds=0.5)
        assert 50 < opened.answers < 150
        assert server.processes()
    assert not server.processes()


def test_what_others_take_of_a_core_is_not_left_to_the_server() -> None:
    with serving("null", [str(SCRIPTS / "null.py"), "{port}"], ONE) as server:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            os.sched_setaffinity(busy.pid, server.cores)
            beside = timed(server, lambda: load.opened(server.port, ONE, rate=20, connections=1, seconds=0.5)).left
        finally:
            busy.kill()
            busy.wait()
    assert beside < 0.5


@pytest.mark.parametrize("program", ["wrk", "none of this name"])
def test_what_is_refused_or_late_breaks_a_case(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WRK", program)
    script = SLOW.replace("{port}", "int(sys.argv[1])").replace("import time", "import sys, time", 1)
    with serving("slow", ["-c", script.replace("{", "{{").replace("}", "}}"), "{port}"], ONE) as server:
        with pytest.raises(Broken, match=r"gave \d answers, and others: \d+ of unanswered"):
            load.opened(server.port, ONE, rate=100, connections=1, seconds=0.2)
        with pytest.raises(Broken, match=r"gave \d+ answers, and (\d+ errors|others: \d+ of 500)"):
            load.closed(server.port, ONE, connections=1, seconds=1)


def test_workers_that_the_service_starts_count_and_end_with_it(bundles: Path) -> None:
    request = requests.instances("/v1/models/tiny-lr:predict", [{"user": "u1"}])
    service = ["-m", "service", "--bundles", str(bundles), "--port", "{port}", "--provider", "cpu", "--workers", "2"]
    with serving("two workers", service, request, cores=CORES) as server:
        assert len(server.processes()) == 3
        found = timed(server, lambda: load.closed(server.port, request, connections=4, seconds=0.5))
        assert 5 < found.cpu_us < 1e6
    assert not server.processes()


def test_a_server_that_ends_is_quoted() -> None:
    with (
        pytest.raises(Failed, match=r"it ended with 1\): no model here"),
        serving("none", ["-c", "raise SystemExit('no model here')"], ONE),
    ):
        pytest.fail("it is not there")
