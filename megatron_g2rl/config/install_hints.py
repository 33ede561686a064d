"""How to install optional packages: text that several messages share."""

from megatron_g2rl.config.shipped import shipped

INSTALL = f"see {shipped('docs/install.md')}"
VLLM = (
    f"without a GPU: pip install --no-deps -r {shipped('constraints.txt')} (after torch); with one: "
    f"pip install vllm==0.32.0; {INSTALL}"
)
TRANSFORMER_ENGINE = f"it is built against the installed torch: {INSTALL}"


def missing_wandb(project: str) -> str:
    """The message about a run that logs to Weights & Biases where wandb is not installed."""
    return (
        f"logging.wandb_project={project}, but wandb is not installed: pip install wandb, or set logging.wandb_project "
        "to null"
    )
