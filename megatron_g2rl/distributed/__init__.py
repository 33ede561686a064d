"""Processes of a run: how ranks start, meet, watch each other and end."""
