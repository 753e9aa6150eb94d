"""The Parquet store: files, schemas, finished cells and trials, integrity, and the selection of trials."""
