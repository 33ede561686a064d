"""Checkpoints of a run: layout on disk, saving, verification, loading."""
