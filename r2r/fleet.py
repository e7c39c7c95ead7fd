"""Restoring on a Ray cluster: Ray Data hands batches of files to workers, which read, restore and write them.

A worker is an actor of Ray: it has the model, and a GPU or some cores. Between the machines go names and results, and
no pixels. `restore_files` plans and reports as it does on one machine, with a `Fleet` for the work.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import r2r_kernels
from r2r.device import keep_freed_memory, pick_device
from r2r.errors import InputError
from r2r.files import remove_temporaries
from r2r.frozen import inference_form
from r2r.model import R2R
from r2r.report import FileResult
from r2r.restoration import Item, Record, Settings, restore_items
from r2r.storage import Address, Location

_BLOCKS = 10_000  # that Ray Data hands out; of more files each block has more
_TRIES = 4  # of a batch whose worker dies each time
_PATIENCE = 5.0  # seconds for a machine to answer
_TRANSFERS = 16  # files that a worker fetches, or stores, at once

# Ray speaks gRPC, which is HTTP/2: both sides begin with a frame of settings, after 3 bytes of its length its kind.
_SETTINGS = b"\4"
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Inside, Ray is connected to a cluster: HOST:PORT, "auto" for the one that this machine belongs to, "local" for a
    new one on this machine alone. Raises InputError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what Ray Data itself does
    import ray

    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address}: not through Ray's client; run it on a machine of the cluster, with --ray auto"
        )
    if address not in ("auto", "local"):
        _check_answer(address)
    more: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with _silence():
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except Exception as error:  # of many kinds: ConnectionError, RuntimeError for other versions ...
        raise InputError(f"--ray {address}: the cluster cannot be reached: {_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """For what Ray's C++ says of how it starts. What fails is an exception."""
    sys.stderr.flush()
    own = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _check_answer(address: str) -> None:
    """At once, where Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--ray {address}: accepted are HOST:PORT, auto and local")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return
            connection.sendall(_GREETING)
            if connection.recv(9)[3:4] != _SETTINGS:
                raise ConnectionError("what answers there is no Ray")
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: the cluster cannot be reached: {_line(error)}") from error


class Fleet:
    """What `restore_files` may be told to restore `by`, while Ray is connected.

    model: the one to restore with, not frozen; each worker gets it once. device: "cuda" for a GPU each, "cpu", "auto"
    for GPUs where the cluster has any. cores: of each worker; by default 1 beside a GPU, else as many as the smallest
    machine has. `Settings.memory` is that of each worker. Raises InputError for what the cluster does not have.
    """

    def __init__(self, model: R2R, device: str = "auto", cores: int | None = None) -> None:
        self.model = model
        self.device, self.resources, self.workers = _workers(device, cores)

    def __call__(
        self, model: R2R, batches: Sequence[Sequence[Item]], settings: Settings, record: Record, show: Record
    ) -> None:
        """As `restore_items`. Whatever becomes of the workers, each file has one result in the end, unless Ray itself
        ends the run: InputError."""
        import ray
        import ray.data

        rows = [{"number": number, "batch": pickle.dumps(batch)} for number, batch in enumerate(batches)]
        if not rows:
            return
        self._remove_temporaries(batches)
        waiting = {str(item.source): item for batch in batches for item in batch if not item.done}
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.max_errored_blocks = -1  # whatever happens to one stops nothing else
        context.target_max_block_size = 1  # results come batch by batch
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        results = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).flat_map(
            _Worker,
            fn_constructor_args=(
                ray.put(self.model),
                ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tries).remote(),
                settings,
                self.device,
                self.resources["num_cpus"],
                os.getcwd(),
                r2r_kernels.__version__,
            ),
            # Two calls at a time: one batch is fetched and stored while another one is restored.
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=min(self.workers, len(rows)),
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            **self.resources,
        )
        try:
            for row in results.iter_rows():
                result: FileResult = pickle.loads(row["result"])
                if waiting.pop(result.input, None):
                    record(result)
                    show(result)
        except ray.exceptions.RayError as error:
            raise InputError(f"the cluster failed: {_line(error)}") from error
        for item in waiting.values():
            result = _failed(item, "no worker gave an answer; Ray's logs tell why")
            record(result)
            show(result)
        self._remove_temporaries(batches)

    def _remove_temporaries(self, batches: Sequence[Sequence[Item]]) -> None:
        """What workers left that were killed, in this run, or in one that was interrupted."""
        for folder in {item.target.parent for batch in batches for item in batch if isinstance(item.target, Path)}:
            remove_temporaries(folder)


def _failed(item: Item, error: str) -> FileResult:
    return FileResult(str(item.source), str(item.target), error=error)


def _workers(device: str, cores: int | None) -> tuple[str, dict[str, Any], int]:
    """Kind of device, resources of each worker, and how many of them there is room for."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device {device}: with --ray accepted are auto, cpu and cuda; Ray chooses which GPU")
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device != "cpu" and gpus:
        return "cuda", {"num_gpus": 1, "num_cpus": cores or 1}, gpus
    if device == "cuda":
        raise InputError("--device cuda: the cluster has no GPU")
    free = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    cores = cores or min(free, default=1)
    workers = sum(one // cores for one in free)
    if not workers:
        raise InputError(f"--cores {cores}: the machines of the cluster have {', '.join(map(str, free)) or 'none'}")
    return "cpu", {"num_cpus": cores}, workers


class _Tries:
    """Counts how often each batch was begun. Ray would give a batch that takes too much memory to one worker after
    another, for ever."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, batch: int) -> int:
        self.begun[batch] += 1
        return self.begun[batch]


class _Worker:
    """Restores batches with one model, one after another."""

    def __init__(
        self, model: Any, tries: Any, settings: Settings, device: str, cores: int, working_folder: str, version: str
    ) -> None:
        import ray

        if version != r2r_kernels.__version__:
            raise InputError(f"a machine of the cluster has R2R {r2r_kernels.__version__}, this one has {version}")
        if settings.memory is None:
            keep_freed_memory()
        torch.set_num_threads(cores)  # as in a run on a machine of so many: another number rounds in another way
        self.model = inference_form(ray.get(model).to(pick_device(device)))
        self.tries, self.settings, self.working_folder = tries, settings, working_folder
        self.lock = threading.Lock()
        self.transfers = ThreadPoolExecutor(_TRANSFERS)

    def __call__(self, row: dict[str, Any]) -> list[dict[str, bytes]]:
        import ray

        batch: list[Item] = pickle.loads(row["batch"])
        with tempfile.TemporaryDirectory(prefix="r2r-") as folder:
            files = [_File(item, self.working_folder, Path(folder, str(number))) for number, item in enumerate(batch)]
            list(self.transfers.map(_File.fetch, files))
            results: dict[str, FileResult] = {}

            def record(result: FileResult) -> None:
                results[result.input] = result

            with self.lock:
                if ray.get(self.tries.begin.remote(row["number"])) > _TRIES:
                    died = f"its worker died, {_TRIES} times, perhaps for want of memory; Ray's logs tell more"
                    return [{"result": pickle.dumps(_failed(item, died))} for item in batch if not item.done]
                restore_items(self.model, [[file.here for file in files]], self.settings, record, lambda _: None)
            todo = [(file, results[str(file.here.source)]) for file in files if not file.item.done]
            return [{"result": pickle.dumps(one)} for one in self.transfers.map(lambda x: x[0].store(x[1]), todo)]


class _File:
    """A file of a batch where it lies, and `here`, where it is restored: in `folder` what object storage holds, else
    its own place, seen from `working_folder`."""

    def __init__(self, item: Item, working_folder: str, folder: Path) -> None:
        def here(place: Location, what: str) -> Path:
            return folder / (what + place.suffix) if isinstance(place, Address) else Path(working_folder, place)

        self.item = item
        self.here = Item(here(item.source, "in"), here(item.target, "out"), item.done)
        self.error: str | None = None

    def fetch(self) -> None:
        if isinstance(self.item.source, Address):
            try:
                _local(self.here.source).parent.mkdir(parents=True, exist_ok=True)
                _local(self.here.source).write_bytes(self.item.source.read())
            except (InputError, OSError) as error:
                self.error = _line(error)

    def store(self, result: FileResult) -> FileResult:
        """What became of it, with the output where it belongs."""
        source, target = self.item.source, self.item.target
        error = self.error or result.error
        if error is None and isinstance(target, Address):
            try:
                target.write(_local(self.here.target).read_bytes())
            except (InputError, OSError) as failed:
                error = _line(failed)
        if error is not None:
            for here, there in ((self.here.source, source), (self.here.target, target)):
                error = error.replace(str(here), str(there))
            result = replace(result, error=error)
        if isinstance(source, Address) and source.listed:
            result = replace(result, size=source.listed.st_size, modified=source.listed.st_mtime_ns)
        return replace(result, input=str(source), output=str(target))


def _local(file: Location) -> Path:
    assert isinstance(file, Path)
    return file


def _line(error: Exception) -> str:
    """What an error says, without the traces of other processes that Ray puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).removeprefix("r2r.errors.InputError: ")
