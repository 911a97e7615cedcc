"""Every metric the service has, by name. A label is a name of ours (a model, a field of its schema), never an id."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from bundle import device
from service.differences import Differences
from service.outcomes import Outcomes
from service.versioned import Versioned

SECONDS = tuple(ms / 1000 for ms in (0.5, 1, 2, 3, 5, 7.5, 10, 15, 25, 50, 100, 250, 500, 1000))
ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000)
LOGIT_ERRORS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
LOGIT_DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """The metrics of one app, in a registry of its own. `endpoint` is one of docs/http-api.md's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "factorlens_requests_total",
            "Requests answered; model is - where none of that name is here",
            ("endpoint", "model", "status"),
            registry=self.registry,
        )
        self.version_requests = Counter(
            "factorlens_version_requests_total",
            "Requests for scores that a version answered, or refused",
            ("model", "version", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "factorlens_request_seconds",
            "From the head of a request to the end of its answer, of those that were not turned away",
            ("endpoint", "model"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "factorlens_batch_rows",
            "Instances or candidates in a request",
            ("endpoint", "model"),
            buckets=ROWS,
            registry=self.registry,
        )
        self.run_rows = Histogram(
            "factorlens_run_rows",
            "Rows in one run of a graph, of one request or of several; graph is one of the bundle's",
            ("model", "graph"),
            buckets=ROWS,
            registry=self.registry,
        )
        self.inference_seconds = Histogram(
            "factorlens_inference_seconds",
            "One run of a graph in onnxruntime; graph is score, explain, rank_context or rank_candidates",
            ("model", "graph"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.failed_runs = Counter(
            "factorlens_failed_runs_total",
            "Runs of a graph that onnxruntime, or the device under it, failed",
            ("model", "graph"),
            registry=self.registry,
        )
        self.unknown_values = Counter(
            "factorlens_unknown_values_total",
            "Rows in which a field held a value that is not in its vocabulary",
            ("model", "field"),
            registry=self.registry,
        )
        self.rows = Counter("factorlens_rows_total", "Rows encoded", ("model",), registry=self.registry)
        self.refused = Counter(
            "factorlens_refused_total",
            "Requests for scores turned away before they were decoded (overload), or not scored in time (deadline)",
            ("model", "reason"),
            registry=self.registry,
        )
        self.dropped_rows = Counter(
            "factorlens_dropped_rows_total",
            "Rows that waited and were not scored: their deadline was over (deadline), or their client had left (gone)",
            ("model", "reason"),
            registry=self.registry,
        )
        self.queue_rows = Gauge(
            "factorlens_queue_rows", "Rows whose bodies are there and that are not answered yet", registry=self.registry
        )
        self.completeness_error = Histogram(
            "factorlens_completeness_error",
            "Distance between the sum of an explanation's terms and the logit of the score graph",
            ("model",),
            buckets=LOGIT_ERRORS,
            registry=self.registry,
        )
        self.model_info = Gauge(
            "factorlens_model_info",
            "1 for every version that is loaded",
            ("model", "version", "digest", "key"),
            registry=self.registry,
        )
        self.ready = Gauge("factorlens_ready", "Whether every model has a version that serves", registry=self.registry)
        self.rejected_bundles = Gauge(
            "factorlens_rejected_bundles",
            "Versions that were found and refused",
            ("model",),
            registry=self.registry,
        )
        self.replays = Counter(
            "factorlens_golden_replays_total",
            "Replays of a version's golden rows, one a minute; outcome is same, differs or failed",
            ("model", "outcome"),
            registry=self.registry,
        )
        self.candidate_sets = Gauge("factorlens_candidate_sets", "Candidate sets that are kept", registry=self.registry)
        self.candidate_set_bytes = Gauge(
            "factorlens_candidate_set_bytes",
            "What the candidate sets count towards max_candidate_set_bytes",
            registry=self.registry,
        )
        self.slow_clients = Counter(
            "factorlens_slow_clients_total",
            "Connections that ended because the client took too long; stage is head, body or answer",
            ("stage",),
            registry=self.registry,
        )
        for stage in ("head", "body", "answer"):
            self.slow_clients.labels(stage)  # a rate needs a 0 to begin with
        self.shadow = Outcomes(
            "factorlens_shadow_total",
            "Requests that a shadow has looked at; outcome is scored, refused or failed",
        )
        self.registry.register(self.shadow)
        self.shadow_difference = Differences(
            "factorlens_shadow_difference",
            "Distance between the logits of the shadow and of the stable version, of every row",
            buckets=LOGIT_DIFFERENCES,
        )
        self.registry.register(self.shadow_difference)
        self.workers = Gauge("factorlens_workers", "Processes that answer requests", registry=self.registry)
        self._memory = DeviceMemory()
        self.registry.register(self._memory)
        self.versions = Versioned()
        self.registry.register(self.versions)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.refusals: dict[tuple[str, str], Counter] = {}
        self._answered: dict[tuple[str, str, int | None, int], tuple[Histogram, list[Counter]]] = {}

    def on_gpu(self, number: int) -> None:
        """From now on the metrics tell of the memory of that GPU."""
        self._memory.sources[str(number)] = partial(device.memory, number)

    def serves(self, model: str) -> None:
        """Let what is counted of a model begin with zero: the first of its kind would go unseen by `rate`."""
        for reason in ("overload", "deadline"):
            self.refusals[model, reason] = self.refused.labels(model, reason)
        for reason in ("deadline", "gone"):
            self.dropped_rows.labels(model, reason)
        self.shadow.serves(model)
        self.shadow_difference.observe(model, ())
        for outcome in ("same", "differs", "failed"):
            self.replays.labels(model, outcome)

    def dropped(self, model: str, reason: str, rows: int) -> None:
        self.dropped_rows.labels(model, reason).inc(rows)

    def answered(self, endpoint: str, model: str, status: int, seconds: float | None, *, version: int | None) -> None:
        """Count one request, and what it took, None of one that was turned away. A label is looked up once: it costs
        more than to count."""
        key = endpoint, model, version, status
        if key not in self._answered:
            counters = [self.requests.labels(endpoint, model, str(status))]
            if version is not None:
                counters.append(self.version_requests.labels(model, str(version), str(status)))
            self._answered[key] = self.request_seconds.labels(endpoint, model), counters
        histogram, counters = self._answered[key]
        for counter in counters:
            counter.inc()
        if seconds is not None:
            histogram.observe(seconds)


class DeviceMemory(Collector):
    """The memory of each GPU in `sources`, by number, as it is when it is asked for."""

    def __init__(self) -> None:
        self.sources: dict[str, Callable[[], Mapping[str, int] | None]] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "factorlens_device_memory_bytes",
            "Memory of the GPU that graphs run on; kind is used, by whomever, or total",
            labels=("device", "kind"),
        )
        for number, memory in list(self.sources.items()):
            for kind, size in (memory() or {}).items():
                family.add_metric((number, kind), size)
        yield family


def names() -> list[str]:
    """The names of our own metrics as Prometheus stores them, counters with `_total`."""
    families = [family for family in Metrics().registry.collect() if family.name.startswith("factorlens_")]
    return [family.name + ("_total" if family.type == "counter" else "") for family in families]
