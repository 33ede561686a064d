"""Tracking of a run: metrics of a step, the files they are written to, and the progress display."""
