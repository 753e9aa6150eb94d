"""Types and tools of every package: errors, layer groups, sizes, batches; machine, disk cache, text."""
