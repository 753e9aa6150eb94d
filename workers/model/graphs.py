"""A batch's decoder layers as CUDA graphs.

Launching their kernels one by one costs the host more time than they take the GPU.
"""

from typing import Any

import torch
from torch import Tensor

from workers.model.decoder import Decoder, Trace


class LayerGraphs:
    """CUDA graphs of the decoder layers for one batch, each recorded at its first use and replayed from then on.

    They launch the same kernels, so they give the same bits.
    """

    def __init__(self, decoder: Decoder, trace: Trace, pool: Any) -> None:
        """Start with no layer recorded.

        Args:
            decoder: on a GPU, its weights and modules as they will be at every replay.
            trace: of the batch, with the input of layer 0.
            pool: memory shared by graphs that never run at the same time (torch.cuda.graph_pool_handle).
        """
        self._decoder, self._trace, self._pool = decoder, trace, pool
        self._hidden = torch.empty_like(trace.hidden[0])  # every graph reads and writes it
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def run(self, hidden_BTH: Tensor, start: int) -> Tensor:
        """Run the layers from `start` to the last.

        Returns: the input of the final norm; it is overwritten by the next run.
        """
        self._hidden.copy_(hidden_BTH)
        for layer in range(start, len(self._decoder.layers)):
            if layer not in self._graphs:
                self._graphs[layer] = self._recorded(layer)
            self._graphs[layer].replay()
        return self._hidden

    def _recorded(self, layer: int) -> torch.cuda.CUDAGraph:
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(main)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            # A first run outside the graph: kernels and libraries are set up at their first use.
            self._decoder.run(self._trace, self._hidden, layer, layer + 1)
            graph.capture_begin(pool=self._pool)
            self._hidden.copy_(self._decoder.run(self._trace, self._hidden, layer, layer + 1))
            graph.capture_end()
        main.wait_stream(aside)
        return graph
