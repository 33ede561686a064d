"""The training loop: setup, collection, updates, saving."""
