"""Checkpoints: sharded over ranks, checksummed, committed atomically, resumable on any number of ranks."""
