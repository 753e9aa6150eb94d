"""A batch's decoder layers as CUDA graphs.

Launching their kernels one by one costs the host more time than they take the GPU.
"""

import torch
from torch import Tensor

from workers.model.decoder import Decoder, Trace


class LayerGraphs:
    """CUDA graphs of the decoder layers, each recorded at its first use by a batch and replayed from then on.

    They launch the same kernels, so they give the same bits. They share memory: no two run at the same time.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Start with no layer recorded. Args: decoder: on a GPU, its weights and modules as at every replay."""
        self._decoder, self._pool = decoder, torch.cuda.graph_pool_handle()
        # One for all: cuBLAS keeps a workspace for each stream, 34 MB on an H100.
        self._aside = torch.cuda.Stream(next(decoder.norm.parameters()).device)
        self._hidden: dict[int, Tensor] = {}  # by batch; all its graphs read and write it
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by batch and layer

    def run(self, batch: int, trace: Trace, hidden_BTH: Tensor, start: int) -> Tensor:
        """Run the layers from `start` to the last.

        Args:
            batch: its number.
            trace: of the batch, with the input of layer 0.
            hidden_BTH: the input of layer `start`.
            start: the first layer.

        Returns: the input of the final norm; it is overwritten by the batch's next run.
        """
        if batch not in self._hidden:
            self._hidden[batch] = torch.empty_like(trace.hidden[0])
        hidden = self._hidden[batch].copy_(hidden_BTH)
        for layer in range(start, len(self._decoder.layers)):
            if (batch, layer) not in self._graphs:
                self._graphs[batch, layer] = self._recorded(layer, trace, hidden)
            self._graphs[batch, layer].replay()
        return hidden

    def _recorded(self, layer: int, trace: Trace, hidden_BTH: Tensor) -> torch.cuda.CUDAGraph:
        main, aside = torch.cuda.current_stream(), self._aside
        aside.wait_stream(main)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            # A first run outside the graph: kernels and libraries are set up at their first use.
            self._decoder.run(trace, hidden_BTH, layer, layer + 1)
            graph.capture_begin(pool=self._pool)
            hidden_BTH.copy_(self._decoder.run(trace, hidden_BTH, layer, layer + 1))
            graph.capture_end()
        main.wait_stream(aside)
        return graph
