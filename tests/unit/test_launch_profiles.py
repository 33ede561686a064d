"""Cluster profiles: errors name key, file and line; secrets are refused and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from g2rl_launch.profile import load_profile, looks_secret, seconds_of
from megatron_g2rl.config.errors import ConfigError

CLUSTERS = sorted((Path(__file__).parents[2] / "launch" / "clusters").glob("*.yaml"))


def profile_file(folder: Path, *lines: str) -> str:
    file = folder / "cluster.yaml"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_a_shipped_profile_is_valid(file):
    assert load_profile(str(file))


@pytest.mark.parametrize(
    "line, message",
    [
        ("partitoin: x", "unknown key partitoin. Nearest valid key: partition"),
        ("ntasks_per_node: 4", "Nearest valid key: ranks_per_node"),
        ("host: login1", "Nearest valid key: tunnel.host"),
        ("constraint: h100", "(sbatch: {constraint: ...})"),
        ("mem_per_cpu: 4G", "(sbatch: {mem-per-cpu: ...})"),
        ("nodes: 0", "nodes is not allowed"),
        ("nodes: many", "nodes is not allowed"),
        ("time: 4 hours", "time is not allowed"),
        ("packager: zip", "one of none, git"),
        ("container_mounts: [/a:/a]", "container_mounts without container_image"),
        ("tunnel: {kind: ssh}", "needs tunnel.host"),
        ("tunnel: {kind: ssh, host: login, job_folder: jobs}", "tunnel.job_folder: jobs has to be an absolute path"),
        ("tunnel: {kind: ssh, host: login, job_folder: /my jobs}", "nemo-run does not quote it"),
        ("tunnel: {port: 22}", "unknown key tunnel.port. Nearest valid key: tunnel."),
        ("segments: 3", "continuation: chain"),
        ("folder: runs", "absolute"),
        ("time: 00:04:00", "not longer than stop_before_end_s"),
        ("time: 00:06:00", "lower stop_before_end_s"),
        ("sbatch: {signal: USR1}", "is set by g2rl launch"),
        ("environment: {HF_TOKEN: hf_abc123}", "put HF_TOKEN under secrets:"),
        ("environment: {WANDB_API_KEY: abc123}", "put WANDB_API_KEY under secrets:"),
        ("environment: {DB_PASSWORD: abc123}", "put DB_PASSWORD under secrets:"),
        ("secrets: [HF_TOKEN=hf_abc123]", "secrets.0 is not allowed"),
    ],
)
def test_an_invalid_key_is_reported_with_its_line_and_without_the_value_of_a_secret(tmp_path, line, message):
    file = profile_file(tmp_path, "account: mine", line)
    with pytest.raises(ConfigError) as error:
        load_profile(file)
    assert message in str(error.value) and f"{file}:2" in str(error.value)
    assert "abc123" not in str(error.value)


def test_numbers_and_booleans_may_be_written_without_quotes(tmp_path):
    file = profile_file(tmp_path, "time: 30", "mem: 0", "exclusive: true", "environment: {LEVEL: 3}")
    profile = load_profile(file)
    assert (profile.time, profile.mem, profile.exclusive, profile.environment) == ("30", "0", True, {"LEVEL": "3"})


def test_a_profile_overrides_its_base_and_arguments_override_both(tmp_path):
    (tmp_path / "site.yaml").write_text("account: mine\npartition: batch\nenvironment: {A: 1, B: 2}\n")
    profile = load_profile(
        profile_file(tmp_path, "base: site.yaml", "partition: debug", "environment: {B: 3}"), nodes=4
    )
    assert (profile.account, profile.partition, profile.nodes) == ("mine", "debug", 4)
    assert profile.environment == {"A": "1", "B": "3"}


@pytest.mark.parametrize("changes", [dict(nodes=0), dict(nodes="4"), dict(ndoes=4), dict(container_mounts="/a:/a")])
def test_a_wrong_argument_is_refused_like_a_line_of_the_file(tmp_path, changes):
    with pytest.raises(ConfigError, match=f"arguments: (unknown key )?{next(iter(changes))}"):
        load_profile(profile_file(tmp_path, "account: mine"), **changes)


def test_arguments_may_be_paths_and_lists(tmp_path):
    profile = load_profile(profile_file(tmp_path, "account: mine"), folder=tmp_path, setup=["module load x"], time=30)
    assert (profile.folder, profile.setup, profile.time) == (tmp_path, ("module load x",), "30")


def test_a_profile_of_the_users_own_folder_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "g2rl" / "clusters").mkdir(parents=True)
    (tmp_path / "g2rl" / "clusters" / "home.yaml").write_text("account: mine\n")
    assert load_profile("home").account == "mine"
    with pytest.raises(ConfigError, match="holds home"):
        load_profile("work")


@pytest.mark.parametrize(
    "time, seconds",
    [
        ("30", 1800),
        ("30:15", 1815),
        ("02:30:00", 9000),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:01", 172_801),
    ],
)
def test_time_limits_are_parsed_as_slurm_does(time, seconds):
    assert seconds_of(time) == seconds


def test_names_of_secrets_are_recognized():
    assert all(map(looks_secret, ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "db_password", "AWS_SECRET_ACCESS_KEY"]))
    assert not any(map(looks_secret, ["NCCL_DEBUG", "KEYBOARD", "MONKEY_BUSINESS", "HF_HOME"]))


def test_a_key_that_is_not_a_string_is_one_message(tmp_path):
    (tmp_path / "a.yaml").write_text('account: a\n"\\uD800": 1\n')
    with pytest.raises(ConfigError, match=r"a\.yaml:2: .*string"):
        load_profile(str(tmp_path / "a.yaml"))
