"""CUDA graphs of a function, one for each shape of its inputs that comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Sequence[Tensor | None]
Function = Callable[..., Sequence[Tensor]]


class Replays:
    """Calls a function of CUDA tensors: the first call with a shape just runs it, the second captures it as a graph
    with memory of its own, and from there on the graph is replayed, so that the host launches it at once.

    At most `most` shapes are known, the least recently used is forgotten first. Results are copies, which the next
    replay does not touch. Threads, on whatever streams, take turns. A copy (`copy.deepcopy`, pickle) starts empty.
    """

    def __init__(self, most: int = 8) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._graphs: dict[Any, _Graph | None] = {}  # in the order of use; None where a shape came once
        self._reads: Sequence[Tensor] = ()  # kept alive, so that nothing else comes to lie in their places
        self._places: list[int] = []

    def __call__(self, function: Function, inputs: Inputs, reads: Sequence[Tensor] = ()) -> Sequence[Tensor]:
        """function(*inputs), tensors on one GPU or None. reads: all other tensors that it reads. Where one was
        exchanged for another, or its memory was, all graphs are forgotten."""
        key = tuple(None if x is None else (x.device, x.dtype, x.shape, x.stride()) for x in inputs)
        places = [x.data_ptr() for x in reads]
        with self._lock:
            if places != self._places:
                for one in list(self._graphs):
                    self._drop(one)
                self._places, self._reads = places, list(reads)
            known = key in self._graphs
            graph = self._graphs.pop(key, None)
            if known and graph is None:
                graph = _Graph(function, inputs)
            self._graphs[key] = graph
            if len(self._graphs) > self.most:
                self._drop(next(iter(self._graphs)))
            if graph is not None:
                return graph.replay(inputs)
        return function(*inputs)

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(graph is not None for graph in self._graphs.values())

    def clear(self) -> None:
        """Forget all shapes and give back the memory."""
        with self._lock:
            for key in list(self._graphs):
                self._drop(key)
            self._reads, self._places = (), []

    def _drop(self, key: Any) -> None:
        graph = self._graphs.pop(key)
        if graph is not None:
            graph.done.synchronize()  # another stream may still be replaying it

    def __reduce__(self) -> tuple[type[Replays], tuple[int]]:
        return Replays, (self.most,)


class _Graph:
    def __init__(self, function: Function, inputs: Inputs) -> None:
        (self.device,) = {x.device for x in inputs if x is not None}
        self.graph, self.done = torch.cuda.CUDAGraph(), torch.cuda.Event()
        stream = torch.cuda.Stream(self.device)
        # Out of inference mode, whose tensors could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self.device):
            self.inputs = [None if x is None else x.clone() for x in inputs]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*self.inputs)  # so that nothing is compiled or set up during the capture
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
            self.done.record()

    def replay(self, inputs: Inputs) -> list[Tensor]:
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.done)  # the turn before, on whatever stream
            for held, given in zip(self.inputs, inputs, strict=True):
                if held is not None and given is not None:
                    held.copy_(given)
            self.graph.replay()
            outputs = [x.clone() for x in self.outputs]
            self.done.record()
        return outputs
