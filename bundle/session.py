"""onnxruntime, and nothing else: the one file that imports it, and only when a graph is opened."""

import os
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from bundle import device
from bundle.buckets import Buckets
from bundle.device import EXECUTION_PROVIDERS, FIRST_GPU, Gpu, Provider
from bundle.errors import RuntimeRefused
from bundle.manifest import Graph, Table
from bundle.rows import EncodedRows

Arrays = dict[str, NDArray[np.float32]]
NO_STATE: Mapping[str, NDArray[np.float32]] = MappingProxyType({})
PLACES = {name: provider for provider, name in EXECUTION_PROVIDERS.items()}
_MAPPED: WeakValueDictionary[tuple[int, ...], np.memmap[Any, Any]] = WeakValueDictionary()  # by what the file is


class Session:
    """One graph of a bundle, loaded.

    `provider` is where it runs: `auto` takes CUDA where it works and the CPU otherwise (`chosen` and `why` say which);
    any other is a demand, and RuntimeRefused says why it cannot be met. onnxruntime never falls back in silence; what
    a provider cannot run it leaves to the CPU, node by node: `nodes` counts them by where they run.

    On a GPU ids have to be below `features`: there they are checked again, because CUDA answers zeros for others.
    """

    def __init__(
        self,
        folder: Path,
        graph: Graph,
        *,
        provider: Provider = "cpu",
        threads: int = 1,
        gpu: Gpu = FIRST_GPU,
        features: int | None = None,
    ) -> None:
        self.graph = graph
        wanted = "cuda" if provider == "auto" else provider
        self.chosen, self.why = wanted, f"provider = {provider}"
        try:
            self._session, self._tables = _create(folder, graph, wanted, threads, gpu)
        except RuntimeRefused as error:
            if provider != "auto":
                raise
            self.chosen, self.why = "cpu", str(error)
            self._session, self._tables = _create(folder, graph, "cpu", threads, gpu)
        self.nodes = _nodes(self._session)
        self._buckets: Buckets | None = None
        if self.chosen != "cpu":
            ort, place = library(), device.place(gpu)
            self._buckets = Buckets(ort, self._session, place=place, limit=features, recorded=gpu.cuda_graphs)

    def run(self, rows: EncodedRows, state: Mapping[str, NDArray[np.float32]] = NO_STATE) -> Arrays:
        """Every output of the graph by name, for B encoded rows. Raises RuntimeRefused where onnxruntime fails.

        `state` holds what the graph takes beside the rows.
        """
        given: dict[str, NDArray[Any]] = {"ids": rows.ids, "values": rows.values, **state}
        try:
            if self._buckets is not None:
                return self._buckets.run(given)
            outputs = self._session.run(list(self.graph.outputs), {name: given[name] for name in self.graph.inputs})
        except Exception as error:  # onnxruntime raises a family of its own that shares only this base
            raise RuntimeRefused(f"onnxruntime cannot run {self.graph.file}: {error}") from error
        return dict(zip(self.graph.outputs, outputs, strict=True))


def _create(folder: Path, graph: Graph, provider: str, threads: int, gpu: Gpu) -> tuple[Any, list[Any]]:
    """A session of onnxruntime, and the mapped tables that have to live as long."""
    wanted = device.providers(provider, gpu)
    name = wanted[0][0]
    ort = library()
    if name not in ort.get_available_providers():
        raise RuntimeRefused(
            f"{provider} cannot run here: the installed onnxruntime has no {name}; "
            "install the extra 'gpu' (onnxruntime-gpu) in place of 'cpu', or choose provider = cpu"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.log_severity_level = 3
    if provider != "cpu":
        os.environ.update(device.environment(provider, gpu))
        ort.preload_dlls()
    try:
        # Of all ways to give onnxruntime a table, only this one needs no copy, and no mapping for each session.
        tables = {} if provider != "cpu" else {key: _mapped(folder, table) for key, table in graph.tables.items()}
        values = [ort.OrtValue.ortvalue_from_numpy(table) for table in tables.values()]
        for key, value in zip(tables, values, strict=True):
            options.add_initializer(key, value)
        session = ort.InferenceSession(folder / graph.file, options, providers=wanted)
    except Exception as error:  # onnxruntime raises a family of its own that shares only this base
        raise RuntimeRefused(f"onnxruntime cannot load {graph.file} on {provider}: {error}") from error
    session.disable_fallback()
    if session.get_providers()[0] != name:
        raise RuntimeRefused(
            f"{provider} cannot run here: onnxruntime could start only {session.get_providers()}; "
            "check the GPU, its driver, CUDA 13 and cuDNN 9"
        )
    return session, values


def _nodes(session: Any) -> Counter[str]:
    """How many nodes of the graph run on cuda, tensorrt and cpu; what TensorRT fuses counts as the nodes it was."""
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        found[PLACES[part.ep_name]] += len(part.get_nodes())
    return found


def _mapped(folder: Path, table: Table) -> NDArray[Any]:
    """The table in its file, which is mapped once for all sessions of the process."""
    path = folder / table.file
    stat = path.stat()
    which = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    whole = _MAPPED.get(which)
    if whole is None:
        whole = _MAPPED[which] = np.memmap(path, np.uint8, mode="r")
    return whole[table.offset : table.offset + table.length].view(table.dtype).reshape(table.shape)


def library() -> Any:
    """onnxruntime, imported. Raises RuntimeRefused where it is not installed, or twice."""
    installed = sorted({d.name.lower().replace("_", "-") for d in metadata.distributions() if _is_onnxruntime(d.name)})
    if len(installed) > 1:
        raise RuntimeRefused(
            f"{' and '.join(installed)} are both installed and overwrite each other's files: uninstall both, "
            "then install one of the extras 'cpu' and 'gpu'"
        )
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it is read once, at import
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeRefused("onnxruntime is not installed: install one of the extras 'cpu' and 'gpu'") from error
    return onnxruntime


def _is_onnxruntime(distribution: str | None) -> bool:
    return (distribution or "").lower().replace("_", "-") in {"onnxruntime", "onnxruntime-gpu"}
