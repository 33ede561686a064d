"""How to install what is optional: the one place for the text that messages repeat. Paths are those of a clone."""

VLLM = (
    "without a GPU: pip install --no-deps -r constraints.txt (after torch); with one: pip install '.[gpu]'; "
    "see docs/install.md"
)
TRANSFORMER_ENGINE = "it is built against the installed torch: see docs/install.md"
WANDB = "pip install wandb"
