"""Prepares data for training: ingestion, encoding, inspection."""
