"""Data preparation: ingestion, encoding, and inspection of training batches."""
