"""Work of many small kernels as one launch: captured as a CUDA graph the first time, replayed from then on."""

from collections.abc import Callable, Hashable

import torch


class CudaGraphs:
    """Captured work by name. It reads and writes the memory that it was captured with, and calls nothing on the host."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, name: Hashable, work: Callable[[], None]) -> None:
        """Do the work; another call with the same name must want the same work on the same memory."""
        if name not in self._graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                work()  # what is made at the first call, such as compiled kernels and cuBLAS workspaces, is no part of a graph
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            self._graphs[name] = graph
        self._graphs[name].replay()
