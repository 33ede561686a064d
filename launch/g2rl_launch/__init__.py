"""Launching runs on Slurm and on this machine. No torch.

Cluster profiles (`profiles`), the environment of ranks (`environment`), what a run's job does (`job`, `sbatch`,
`attempts.sh`), showing it (`preview`), handing it to nemo-run (`submission`, `nemo`; over `ssh`, with what is checked
`there`) or starting it here (`here`), looking after it (`registry`, `runs`, `waiting`, `status`, `logs`); many runs of
one configuration (`sweep`, `sweeping`, `lanes`).
"""
