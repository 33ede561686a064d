"""`g2rl convert`: arguments of the conversions between Hugging Face and Megatron folders."""

from __future__ import annotations

import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megatron_g2rl.commands.imports import without_collections
from megatron_g2rl.config.command_line import CONFIGURATION_ERROR, RUN_ERROR, help_examples, user_errors


class Dtype(StrEnum):
    """Data type of the tensors of a converted checkpoint."""

    keep, bf16, fp16, fp32 = "keep", "bf16", "fp16", "fp32"
    bfloat16, float16, float32 = "bfloat16", "float16", "float32"


app = typer.Typer(no_args_is_help=True, help="Convert checkpoints between Hugging Face and Megatron, both ways.")
_Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder to read.")]
_Target = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; it appears only after verification.")]
_Dtype = Annotated[Dtype, typer.Option("--dtype", help="Data type of the written tensors; keep: unchanged.")]
_Family = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Model family, as model.family of a run; by default that of its model_type."),
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model in DST after the new one has been verified.")
]


@app.command("hf-to-megatron", epilog=help_examples("g2rl convert hf-to-megatron Qwen3-0.6B qwen3-0.6b-megatron"))
def hf_to_megatron(
    source: _Source,
    target: _Target,
    dtype: _Dtype = Dtype.keep,
    overwrite: _Overwrite = False,
    family: _Family = None,
) -> None:
    """Convert a Hugging Face folder to a Megatron folder, which model.path can name under every layout."""
    _convert("hf_to_megatron", source, target, dtype, overwrite=overwrite, family=family)


@app.command(
    "megatron-to-hf", epilog=help_examples("g2rl convert megatron-to-hf runs/mine/checkpoints/step_00000200 published")
)
def megatron_to_hf(
    source: _Source,
    target: _Target,
    dtype: _Dtype = Dtype.keep,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest safetensors file, such as 500MB.")] = "5GB",
    overwrite: _Overwrite = False,
    family: _Family = None,
) -> None:
    """Convert a Megatron folder (a converted model or a checkpoint of a run) to a Hugging Face folder."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = shard_size[:-2], shard_size[-2:].upper()
    if unit not in units or not number.replace(".", "", 1).isdigit() or not float(number):
        typer.echo(f"--shard-size {shard_size}: give a number and KB, MB or GB, such as 5GB", err=True)
        raise typer.Exit(CONFIGURATION_ERROR)
    size = int(float(number) * units[unit])
    _convert("megatron_to_hf", source, target, dtype, overwrite=overwrite, family=family, shard_bytes=size)


def _convert(direction: str, source: Path, target: Path, dtype: Dtype, **options: object) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # no GPU is needed, but Megatron uses any visible one
    with warnings.catch_warnings(), without_collections():
        warnings.simplefilter("ignore")  # Megatron warns of packages that a conversion does not need
        import torch

        from megatron_g2rl.policy.hf import convert as conversion

    short = {Dtype.bf16: "bfloat16", Dtype.fp16: "float16", Dtype.fp32: "float32"}
    wanted = None if dtype is Dtype.keep else getattr(torch, short.get(dtype, dtype.value))
    with user_errors(RUN_ERROR):
        getattr(conversion, direction)(source, target, dtype=wanted, **options)
    typer.echo(f"wrote and verified {target}")
