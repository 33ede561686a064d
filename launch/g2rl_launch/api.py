"""For Python scripts that use nemo-run: an executor from a cluster profile, and a task that trains a run.

    import nemo_run as run
    from g2rl_launch import executor, recipe

    slurm = executor("my_cluster.yaml", nodes=2)
    task = recipe("my.yaml", slurm, run={"name": "first"}, trainer={"steps": 1000})
    run.run(task, executor=slurm, name="first", detach=True)

Runs in the launch environment. The job counts its attempts and resumes like one of `g2rl launch`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import nemo_run

from g2rl_launch.job import check_secrets, make_job, new_launch_id
from g2rl_launch.nemo import LaunchDetails, script_of, slurm_executor
from g2rl_launch.profile import Profile, load_profile, profile_folder
from g2rl_launch.run import LaunchedRun, known, remember
from g2rl_launch.submit import check_run
from g2rl_launch.sweep_file import written_value
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.model_shape import read_model_shape


def executor(profile: str, **changes: Any) -> nemo_run.SlurmExecutor:
    """nemo-run's executor for jobs of a cluster profile: resources, container, setup, and counting of attempts.

    Args:
        profile: file of a cluster profile, or its name in the user's folder of profiles.
        changes: values that override keys of the profile, such as `nodes=4`.

    Raises:
        ConfigError: the profile is invalid, or a secret that it names is not set.
    """
    settings = load_profile(profile, **changes)
    check_secrets(settings)
    return slurm_executor(settings, PurePosixPath(settings.folder or Path.cwd()))


def recipe(
    config: str | Path, executor: nemo_run.SlurmExecutor | None = None, **overrides: Mapping[str, Any]
) -> nemo_run.Script:
    """A nemo-run task that trains a run, for `run.run` and `run.Experiment`. Each task is one launch of the run.

    From then on, `g2rl status`, `logs` and `cancel` find the run by its name.

    Args:
        config: YAML file of the run.
        executor: result of `executor`: the layout is checked against its ranks, and its `folder` and `packager` are
            used. None: the run uses the current folder, and its layout is checked when the job starts.
        overrides: values of keys by section, such as `trainer={"steps": 1000}`.

    Raises:
        ConfigError: the configuration is invalid, or does not match the executor.
    """
    details = executor.job_details if executor is not None else None
    if details is not None and not isinstance(details, LaunchDetails):
        raise ConfigError("recipe: `executor` must be the result of g2rl_launch.executor")
    profile = Profile.model_validate_json(details.profile) if details else Profile()
    texts = list(_texts(overrides))
    loaded = load_config(Path(config), texts)
    job = make_job(loaded, Path(config), texts, profile)
    if details:
        files = profile.tunnel.kind == "local"
        check_run(loaded, read_model_shape(loaded.model.path), job.ranks, files=files)
        details.attempts = str(job.launch_folder)
    run = LaunchedRun(job.name, job.run_folder, profile.tunnel)
    if known(run) is None:
        remember(run)
    return script_of(job, new_launch_id(job.name))


def _register(name: str) -> None:
    """Make a profile of the user's folder available as an executor on nemo-run's command line."""

    def configured() -> nemo_run.Config[nemo_run.SlurmExecutor]:
        return executor(name).to_config()

    nemo_run.cli.factory(configured, name=name)


def _texts(overrides: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """`section.key=value` of each override."""
    for section, values in overrides.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"recipe: {section}={values!r} is not a section: write {section}={{'KEY': VALUE}}")
        for key, value in values.items():
            yield f"{section}.{key}={written_value(value)}"


for _file in profile_folder().glob("*.yaml"):  # `nemo TASK run.executor=my_cluster run.executor.nodes=2`
    _register(_file.stem)
