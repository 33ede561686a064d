"""Exploration methods: measures of how novel each response of a step is, all followed by the same mappings and loss.

A method computes novelty from inputs that the loop supplies. Each is one file and one line of `registry.METHODS`.
"""

from megatron_g2rl.exploration.methods.interface import Input, Method, StepInputs, load_method

__all__ = ["Input", "Method", "StepInputs", "load_method"]
