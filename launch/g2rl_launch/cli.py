"""`g2rl launch|sweep|status|logs|cancel`: the commands; `install.enter` moves them to the launch environment."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from g2rl_launch import install as installing
from g2rl_launch import monitor
from g2rl_launch import run as runs
from megatron_g2rl.config.command_line import RUN_ERROR, help_examples, override_argument, user_errors
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.terminal import table_console

app = typer.Typer(pretty_exceptions_enable=False)
"""The launch commands, which megatron_g2rl.cli adds to its own."""


@app.command(
    epilog=help_examples(
        "g2rl launch my.yaml --cluster my_cluster.yaml --dry-run",
        "g2rl launch my.yaml --cluster my_cluster.yaml --nodes 4 trainer.steps=1000",
        "g2rl launch my.yaml --cluster my_cluster.yaml --render job.sh",
        "g2rl launch --install",
    )
)
@user_errors()
def launch(
    config_path: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="YAML file of the run.")] = None,
    overrides: Annotated[list[str] | None, override_argument("Keys to override, as for train.")] = None,
    cluster: Annotated[str | None, typer.Option(metavar="PROFILE", help="YAML file of a cluster profile.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes, overrides the profile's.")] = None,
    segments: Annotated[int | None, typer.Option(min=1, help="Jobs to queue for a chain, one after the other.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the job script and the batch ledger.")] = False,
    render: Annotated[Path | None, typer.Option(metavar="FILE", help="Only write a job script for sbatch.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; the exit code is the run's.")] = False,
    install: Annotated[bool, typer.Option("--install", help="Install nemo-run for launching, once.")] = False,
) -> None:
    """Train on a cluster: submit CONFIG as a Slurm job through nemo-run; it resumes unattended until it is done."""
    from g2rl_launch import submit

    if install:
        typer.echo(installing.install())
        raise typer.Exit
    if config_path is None or cluster is None:
        raise ConfigError("g2rl launch needs CONFIG and --cluster PROFILE (launch/clusters, launch/README.md)")
    changes = {"nodes": nodes, "segments": segments, "continuation": "chain" if segments and segments > 1 else None}
    changes = {key: value for key, value in changes.items() if value is not None}
    launched = submit.Launch(config_path, overrides or (), cluster, **changes)
    if dry_run or render:
        _show(launched, dry_run, render)
        raise typer.Exit
    for note in submit.device_notes(launched):
        typer.echo(f"note: {note}", err=True)
    run = launched.submit()
    typer.echo(f"{run.name}: job {' '.join(run.submitted)}; g2rl status {run.name}, g2rl logs {run.name}")
    if wait:
        raise typer.Exit(_wait(run))


def _show(launched, dry_run: bool, render: Path | None) -> None:
    """Print what `--dry-run` and `--render` show, and write the job script."""
    from megatron_g2rl.config.ledger import batch_ledger, ledger_table

    console = table_console(140)
    if dry_run:
        console.print(launched.summary(), "")
    console.print(ledger_table(batch_ledger(launched.config, launched.job.ranks, launched.shape)))
    if dry_run:
        typer.echo(f"\n{launched.script()}")
    if render:
        typer.echo(launched.write(render))


def _wait(run) -> int:
    """Wait for the end of a run, print how it ended and return its exit code."""
    try:
        code = monitor.wait_for(run, partial(typer.echo, err=True))
    except KeyboardInterrupt:
        typer.echo(f"\n{run.name} keeps running; g2rl cancel {run.name} cancels it", err=True)
        return 130
    if code:
        typer.echo(f"{run.name} {run.state()}\n{monitor.last_error(run)}", err=True)
    else:
        typer.echo(f"{run.name}: {run.state()}")
    return code


@app.command(
    epilog=help_examples(
        "g2rl sweep launch/sweeps/learning_rate.yaml --dry-run",
        "g2rl sweep my_sweep.yaml --cluster my_cluster.yaml --wait",
        "g2rl sweep my_sweep.yaml --retry-failed",
        "g2rl sweep my_sweep.yaml --cancel",
    )
)
@user_errors()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of a sweep (launch/README.md).")],
    cluster: Annotated[str | None, typer.Option(metavar="PROFILE", help="Profile, instead of the file's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show all runs and what would be submitted.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; exit code 1 unless all finished.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Submit failed runs again.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel all its runs, queued ones first.")] = False,
) -> None:
    """Launch many runs, with a limit on concurrent ones; the same command again submits the missing ones.

    Without a cluster, the runs are executed on this machine, one after another.
    """
    from g2rl_launch.sweep import Sweep

    many = Sweep(file, cluster)
    chosen: list[str] = []
    if cancel and (dry_run or wait or retry_failed):
        raise ConfigError("--cancel cannot be combined with --dry-run, --wait or --retry-failed")
    if cancel:
        many.cancel(typer.echo)
    elif dry_run:
        chosen = many.to_submit(many.statuses(), retry_failed)
    else:
        many.submit(retry_failed, typer.echo)
        if wait:
            many.wait(typer.echo)
    statuses = many.statuses()
    table_console(200).print(many.table(statuses, chosen))
    if dry_run:
        typer.echo(many.cost())
    waited = (wait or many.is_local) and not (dry_run or cancel)
    if waited and {status.state for status in statuses.values()} != {"finished"}:
        raise typer.Exit(RUN_ERROR)


@app.command(epilog=help_examples("g2rl status", "g2rl status my_run"))
@user_errors()
def status(
    names: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Names of runs; all by default.")] = None,
) -> None:
    """Show state, step, attempts, and job ids of launched runs."""
    chosen = names or runs.names()
    if not chosen:
        typer.echo("no run was launched from here; `g2rl launch CONFIG --cluster PROFILE` launches one")
        raise typer.Exit
    table, notes = monitor.status(chosen)
    table_console(140).print(table)
    for note in notes:
        typer.echo(note)


@app.command(epilog=help_examples("g2rl logs my_run", "g2rl logs my_run --lines 100", "g2rl logs my_run --follow"))
@user_errors()
def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a launched run, or its folder.")],
    lines: Annotated[int | None, typer.Option(min=1, metavar="N", help="The last N lines of all attempts.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print new output of all attempts until the end.")] = False,
) -> None:
    """Print the logs of all attempts, including restarts."""
    if follow:
        monitor.follow_logs(runs.find(run), lines or 10, sys.stdout.buffer, partial(typer.echo, err=True))
    else:
        monitor.show_logs(runs.find(run), lines, sys.stdout.buffer)


@app.command(epilog=help_examples("g2rl cancel my_run", "g2rl sweep my_sweep.yaml --cancel"))
@user_errors()
def cancel(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of launched runs, or their folders.")],
) -> None:
    """Cancel runs and their queued jobs. Relaunching resumes from the latest checkpoint."""
    for run in [runs.find(name) for name in names]:
        typer.echo(runs.cancel(run))
