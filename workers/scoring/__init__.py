"""Scores: captured inputs and gradients, gradient scores, KL divergence, and measured recipes."""
