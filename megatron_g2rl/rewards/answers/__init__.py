"""Exact comparison of two final answers: one spelling, a strict grammar, exact values.

An answer outside the grammar is never read in part. Time and memory are bounded for any answer: a power, factorial or
binomial coefficient too large to write down is an unknown, equal to itself and never computed.
"""
