"""Processes of a run: how ranks start, rendezvous, monitor each other and end."""
