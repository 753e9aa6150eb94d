"""The model: checkpoint files, loading, forward passes, decoder layers, CUDA graphs, and memory."""
