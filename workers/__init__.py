"""Code that runs beside the model: data, loading, quantizers, scoring, export, and the Ray actor around them."""
