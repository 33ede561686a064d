"""Exact comparison of two final answers: normalization, a strict grammar, exact values.

An answer outside the grammar is never parsed partially. Time and memory are bounded for any answer: a power, factorial
or binomial coefficient that is too large is treated as an unknown, equal to itself and never computed.
"""
