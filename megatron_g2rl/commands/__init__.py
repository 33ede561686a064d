"""The work of single commands of `g2rl`: evaluate, doctor and examples; `cli.py` has their arguments."""
