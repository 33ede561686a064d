"""The sections of the configuration, one file per subject; `config/tree.py` combines them."""
