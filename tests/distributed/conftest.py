"""Fixtures: a function that calls another one on several ranks, and the small models that they load."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from forked_ranks import run_ranks
from random_models import write_random_model


@pytest.fixture(scope="session")
def ranks() -> Callable:
    """The function `run_ranks`."""
    return run_ranks


VOCABULARY = 307
"""Deliberately no round number, so that every test has padded rows."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Callable[[str, bool], str]:
    """(family, tied) -> folder of a random model, created once."""
    made: dict[tuple[str, bool], str] = {}

    def get(family: str, tied: bool) -> str:
        key = (family, tied)
        if key not in made:
            made[key] = write_random_model(
                tmp_path_factory.mktemp(f"{family}_{tied}"),
                family,
                seed=3,
                noise=0.2,
                vocab_size=VOCABULARY,
                intermediate_size=96,
                num_hidden_layers=4,
                rope_parameters=dict(rope_type="default", rope_theta=1e6),
                initializer_range=0.08,
                tie_word_embeddings=tied,
            )
        return made[key]

    return get
