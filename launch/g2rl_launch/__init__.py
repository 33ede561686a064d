"""Launch runs on Slurm through nemo-run, in a separate environment. Imports no torch.

`cli` defines the commands. `profile` describes a cluster, `job` renders a run's job script (`job.sh.jinja`),
`preflight` checks what a job needs, `submit` launches a run, `nemo` calls nemo-run (through `ssh` if Slurm is on
another machine). `run` represents and finds launched runs, `monitor` shows them, `sweep_file` and `sweep` launch many.
`api` is for Python scripts that use nemo-run.
"""

from typing import Any

__all__ = ["executor", "recipe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from g2rl_launch import api  # imports nemo_run, which takes seconds

    return getattr(api, name)
