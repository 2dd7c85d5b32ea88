"""Batch inference with R-4B: plan, read, generate, commit. `batch.py` is the whole flow."""
