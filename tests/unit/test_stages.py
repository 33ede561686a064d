"""Layers of pipeline stages: equal parts, layouts, and errors about impossible ones."""

from __future__ import annotations

import pytest

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.config.stages import check_stages, parse, stage_layers, written


def policy(pipeline: int, layout: str | None = None, virtual: int = 1) -> PolicyConfig:
    return PolicyConfig(pipeline_parallel=pipeline, virtual_stages=virtual, pipeline_layout=layout)


@pytest.mark.parametrize("layout", ["12*7,10", "1", "3,4,3", "2*2,3*2"])
def test_a_layout_survives_a_round_trip(layout):
    assert written(parse(layout)) == layout


def test_94_layers_run_on_8_stages():
    assert stage_layers(policy(8, "12*7,10"), 94) == [12] * 7 + [10]
    assert check_stages(policy(8, "12*7,10"), 94) is None
    assert check_stages(policy(4, "12*7,10", virtual=2), 94) is None
    assert stage_layers(policy(4), 28) == [7] * 4


@pytest.mark.parametrize(
    ("chosen", "layers", "expected_message"),
    [
        (policy(8), 94, ["94 layers do not divide", "pipeline_layout=12*6,11*2 or 12*7,10", "1, 2, 47, 94"]),
        (policy(8, "12*8"), 94, ["8 chunks with 96 layers", "12*7,10"]),
        (policy(8, "12*6,22"), 94, ["7 chunks with 94 layers", "= 8"]),
        (policy(2, "4,0"), 4, ["an empty chunk", "pipeline_layout=2*2"]),
        (policy(8), 4, ["= 8 is more than 4", "4 layers"]),
        (policy(8, "9999*9999"), 94, ["9999 chunks", "12*7,10"]),
        (policy(2), 10**12 + 1, ["do not divide", "500000000001,500000000000"]),
    ],
)
def test_an_impossible_layout_is_refused_with_possible_ones(chosen, layers, expected_message):
    message = check_stages(chosen, layers)
    for part in expected_message:
        assert part in message


def test_every_suggested_layout_is_possible():
    for layers in range(1, 60):
        for chunks in range(2, layers + 1):
            if message := check_stages(policy(chunks), layers):
                proposed = message.partition("pipeline_layout=")[2].partition(", or let")[0].split(" or ")
                for layout in proposed:
                    assert check_stages(policy(chunks, layout), layers) is None, (layers, chunks, layout)
