"""Checkpoints for runtimes: compressed-tensors schemes, packed weights, folded scales, read back."""
