"""`training_loss` with the fields of its records as keywords, for tests that vary them one at a time."""

from __future__ import annotations

from dataclasses import fields

from megatron_g2rl import algorithm

_OPTIONS = {field.name for field in fields(algorithm.LossOptions)}


def training_loss(*tensors, totals=None, cp_group=None, **keywords):
    """Split the keywords into `LossInputs` and `LossOptions`; unknown ones are refused by the records."""
    options = algorithm.LossOptions(**{name: keywords.pop(name) for name in _OPTIONS & keywords.keys()})
    return algorithm.training_loss(algorithm.LossInputs(*tensors, **keywords), options, totals, cp_group)
