"""The command line: `g2rl train CONFIG [key=value ...]`, `g2rl report RUN...`, `g2rl doctor [CONFIG]`, `g2rl launch`.

    g2rl warm-start examples/quickstart/model.yaml
    g2rl train examples/quickstart/arithmetic.yaml --dry-run
    g2rl train examples/quickstart/arithmetic.yaml trainer.steps=3

Light on purpose: torch is not imported before the configuration has been read and checked.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

if find_spec("g2rl_launch") is None:  # a checkout that is on the path but not installed
    sys.path.append(str(Path(__file__).parents[1] / "launch"))

from g2rl_launch import cli as launching
from g2rl_launch import install
from megatron_g2rl import __version__
from megatron_g2rl.commands import convert
from megatron_g2rl.commands.imports import without_collections
from megatron_g2rl.commands.on_ranks import run_on_ranks
from megatron_g2rl.config import Config
from megatron_g2rl.config.checks import cautions, check_config, check_machine
from megatron_g2rl.config.command_line import (
    CONFIGURATION_ERROR,
    RUN_ERROR,
    help_examples,
    override_argument,
    user_errors,
)
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.ledger import batch_ledger, ledger_table
from megatron_g2rl.config.loading import dump_config, load_config
from megatron_g2rl.config.model_shape import ModelShape, read_model_shape
from megatron_g2rl.config.terminal import table_console
from megatron_g2rl.config.warm_start import WarmStart, load_warm_start
from megatron_g2rl.config.world import launched_rank, world_size
from megatron_g2rl.distributed.rank_reports import is_reporting_process, write_exit_code, write_message
from megatron_g2rl.distributed.ranks import ignore_stop_signals, wait_for_first_rank
from megatron_g2rl.errors import Interrupted, UserError

app = typer.Typer(name="g2rl", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"g2rl {__version__}")
        raise typer.Exit


@app.callback(
    epilog=help_examples(
        "g2rl doctor",
        "g2rl train examples/quickstart/g2rl.yaml --dry-run",
        "g2rl report runs/quickstart_grpo runs/quickstart_g2rl",
        "g2rl --install-completion",
    )
)
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Gradient-guided reinforcement learning (G2RL) for large language models on Megatron-Core."""


@app.command(
    epilog=help_examples(
        "g2rl train examples/quickstart/g2rl.yaml --dry-run",
        "g2rl train examples/quickstart/g2rl.yaml run.name=mine trainer.steps=20",
        "g2rl train my.yaml trainer.ranks=2 policy.tensor_parallel=2",
    )
)
def train(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of the run (docs/configuration.md).")
    ],
    overrides: Annotated[
        list[str] | None, override_argument("Keys to set, such as algorithm.kl_coefficient=0.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the batch ledger, then exit.")
    ] = False,
) -> None:
    """Train a model. Starts trainer.ranks processes on this machine unless torchrun or Slurm has started the ranks."""
    try:
        config = load_config(config_path, overrides or ())
        shape = read_model_shape(config.model.path)
        check_config(config, shape)
        for caution in cautions(config) if is_reporting_process() else ():
            typer.echo(caution, err=True)
        if dry_run:
            _describe(config, shape)
            raise typer.Exit
        check_machine(config)
        raise typer.Exit(_train(config, [str(config_path), *(overrides or ())]))
    except UserError as error:
        raise _reported(error) from None


@app.command(
    epilog=help_examples(
        "g2rl warm-start examples/quickstart/model.yaml",
        "g2rl warm-start examples/quickstart/model.yaml output=models/short steps=100",
    )
)
def warm_start(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of the model to create (docs/configuration.md).")
    ],
    overrides: Annotated[list[str] | None, override_argument("Keys to set, such as steps=100.", WarmStart)] = None,
) -> None:
    """Create a model for `train`: random weights or an existing model, fine-tuned on a built-in task."""
    try:
        settings = load_warm_start(config_path, overrides or ())
        raise typer.Exit(_warm_start(settings, [str(config_path), *(overrides or ())]))
    except UserError as error:
        raise _reported(error) from None


def _reported(error: UserError) -> typer.Exit:
    """Report the error of a rank, once for all ranks if all of them have it; returns the exit to raise."""
    ignore_stop_signals()
    rank, configuration = launched_rank(), isinstance(error, ConfigError)
    launcher_reports = write_message(str(error))
    if not launcher_reports:
        # All ranks usually detect the same configuration error; any other error may concern one rank only.
        if rank != "0" and configuration:
            wait_for_first_rank()
        typer.echo(str(error) if rank == "0" else f"rank {rank}: {error}", err=True)
    code = CONFIGURATION_ERROR if configuration else RUN_ERROR
    write_exit_code(code)
    return typer.Exit(code)


@app.command(
    epilog=help_examples(
        "g2rl evaluate my.yaml --checkpoint runs/mine --benchmark math500,aime24",
        "g2rl evaluate my.yaml --checkpoint Qwen/Qwen3-4B-Base --checkpoint runs/mine --benchmark gsm8k --problems 200",
        "g2rl evaluate my.yaml --checkpoint runs/mine --benchmark mine.yaml --samples 1 --temperature 0",
    )
)
def evaluate(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of a run: engine, prompt template, length limits, seed.")
    ],
    overrides: Annotated[list[str] | None, override_argument("Keys to set, such as rollout.engine=vllm.")] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN|FOLDER|HUB", help="Model to evaluate; repeat it for several. By default model.path of CONFIG."
        ),
    ] = None,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME]", help="Names or .yaml files; by default the evaluation sets of CONFIG."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("evaluations"),
    samples: Annotated[int | None, typer.Option(min=1, help="Responses per problem.")] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Number of problems, always the same ones.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sampling temperature; 0: greedy.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=1e-6, max=1.0, help="Total probability of the tokens to sample from; 1: all.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Number of most probable tokens to sample from; 0: all.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Smallest probability to sample, relative to the largest; 0: no limit."),
    ] = None,
) -> None:
    """Evaluate saved models on benchmarks; the same command resumes an interrupted evaluation."""
    from megatron_g2rl.commands.evaluate import check_command, run_command

    options = dict(samples=samples, problems=problems, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    try:
        command = check_command(config_path, overrides or (), checkpoint or (), benchmark or (), output, options)
        given = {"checkpoint": checkpoint or (), "benchmark": benchmark or (), "output": (output,)}
        given |= {name.replace("_", "-"): (value,) for name, value in options.items() if value is not None}
        arguments = [f"--{name}={value}" for name, values in given.items() for value in values]
        raise typer.Exit(run_command(command, ["evaluate", str(config_path), *(overrides or ()), *arguments]))
    except UserError as error:
        raise _reported(error) from None


@app.command(epilog=help_examples("g2rl analyze CONFIG evaluations --output geometry"))
def analyze(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of a run: layout, precision, micro-batches, encoder.")
    ],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RESULTS... [KEY=VALUE]...",
            help="Results of g2rl evaluate, at most 24 of a model on a benchmark; and keys to set.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the analysis.")] = Path("geometry"),
) -> None:
    """Analyze the geometry of evaluated responses: cosines of update directions and texts, by correctness."""
    from megatron_g2rl.commands.analyze import check_command, run_command

    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    folders = [Path(argument) for argument in arguments if argument not in overrides]
    try:
        command = check_command(config_path, overrides, folders, output)
        raise typer.Exit(run_command(command, ["analyze", str(config_path), *arguments, f"--output={output}"]))
    except UserError as error:
        raise _reported(error) from None


@app.command(
    epilog=help_examples(
        "g2rl report runs/quickstart_grpo runs/quickstart_g2rl --output g2rl.html",
        "g2rl report runs/grpo_seed* runs/g2rl_seed* --evaluations evaluations",
        "g2rl report --table evaluations --baseline grpo_seed0_step_00000200 --output table.tex",
    )
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders; seeds of one setting are combined.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="File to write: .html, or .md (tables only), or .tex (--table)."),
    ] = None,
    table: Annotated[
        bool, typer.Option("--table", help="Write a table of results; each RUN is a folder of g2rl evaluate.")
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="NAME", help="Run or setting to compare with. Default: the one without exploration."
        ),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluations", metavar="FOLDER", help="Results of g2rl evaluate of these runs; may be repeated."
        ),
    ] = None,
) -> None:
    """Compare runs on one self-contained HTML page, or evaluations in a table for a paper."""
    output = output or Path("table.md" if table else "report.html")
    with user_errors(RUN_ERROR):
        if table:
            from megatron_g2rl.report.tables import write_table

            if evaluations:
                raise UserError("--evaluations is for the page: with --table, give the folders instead of RUN")
            write_table(runs, output, baseline)
        else:
            from megatron_g2rl.report import write_report  # importing matplotlib takes a second

            write_report(runs, output, evaluations or (), baseline)
    typer.echo(output)


@app.command(
    epilog=help_examples("g2rl doctor", "g2rl doctor examples/qwen3_4b_math/g2rl.yaml policy.tensor_parallel=2")
)
def doctor(
    config_path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Configuration to check against this machine.")
    ] = None,
    overrides: Annotated[list[str] | None, override_argument("Keys to set, such as policy.device=cpu.")] = None,
) -> None:
    """Show what is installed, which code paths run here, and what is slower; exit code 2 if CONFIG cannot run."""
    from megatron_g2rl.commands.doctor import examine

    with user_errors(CONFIGURATION_ERROR):
        config = load_config(config_path, overrides or ()) if config_path else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns of missing packages that the table lists anyway
        can_run = examine(config, table_console())
    raise typer.Exit(0 if can_run else CONFIGURATION_ERROR)


@app.command(
    epilog=help_examples("g2rl data examples/quickstart/g2rl.yaml", "g2rl data my.yaml data.source=rows.jsonl")
)
def data(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, override_argument("Keys to set, such as data.answer_regex=gsm8k.")] = None,
) -> None:
    """Inspect the data of a run: rows, prompts, lengths, references, overlap with the evaluation set."""
    with user_errors(CONFIGURATION_ERROR):
        config = load_config(config_path, overrides or ())
        check_config(config, ranks=1)
        from megatron_g2rl.data.overview import show_data

        show_data(config, table_console(120))


@app.command(epilog=help_examples("g2rl examples", "g2rl examples my_examples"))
def examples(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write, created if needed.")] = Path(
        "examples"
    ),
) -> None:
    """Copy the example configurations to DIR without overwriting files, and print the path of the documentation."""
    from megatron_g2rl.commands.examples import copy_examples
    from megatron_g2rl.config.shipped import shipped

    with user_errors(RUN_ERROR):
        for file in copy_examples(folder):
            typer.echo(file)
    typer.echo(f"documentation: {shipped('docs/README.md')}")


app.add_typer(convert.app, name="convert")
app.add_typer(launching.app)


def main() -> None:
    """Entry point of the console script."""
    install.enter(sys.argv[1:])
    # Megatron, transformers and torch log heavily at INFO and in warnings, which would bury the lines of the run.
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if launched_rank() == "0":  # rank 0 logs for all ranks
        for name in ("megatron_g2rl", "__main__"):
            logging.getLogger(name).setLevel(logging.INFO)
    _bars_only_on_a_terminal()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    # A console script has its own folder on sys.path but not the working directory, where reward.function may be.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    app()


def _bars_only_on_a_terminal() -> None:
    """Disable Hugging Face progress bars in logs and on ranks other than 0; the libraries read this on import."""
    if not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _describe(config: Config, shape: ModelShape | None) -> None:
    """Print what `--dry-run` shows; what this machine lacks is only a warning, since the run may be for another one."""
    typer.echo(dump_config(config))
    rows = batch_ledger(config, world_size(config), shape)
    table_console().print(ledger_table(rows))
    try:
        check_machine(config)
    except ConfigError as error:
        typer.echo(f"\n{error}", err=True)


def _warm_start(settings: WarmStart, arguments: list[str]) -> int:
    """Create the model on all ranks; returns the exit code."""

    def work() -> int:
        with without_collections():
            from megatron_g2rl.training.warm_start import warm_start as create_model

        create_model(settings)
        return 0

    return run_on_ranks(work, settings.ranks, ["warm-start", *arguments], settings.policy.device)


def _train(config: Config, arguments: list[str]) -> int:
    """Run the trainer on all ranks; returns the exit code of the run."""
    folder = config.run.directory / config.run.name

    def work() -> int:
        with without_collections():
            from megatron_g2rl.policy.checkpoint.checkpoints import resume_hint
            from megatron_g2rl.training.trainer import train as run_trainer

        try:
            return run_trainer(config)
        except Interrupted as error:
            raise UserError(f"{error}. {resume_hint(folder / 'checkpoints')}") from error

    return run_on_ranks(work, config.trainer.ranks, ["train", *arguments], config.policy.device, folder)


if __name__ == "__main__":
    main()
