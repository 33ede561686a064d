"""`g2rl launch` and the commands that monitor runs, through a real local sshd, as if Slurm were on another machine.

The host is defined only in the user's ssh configuration: an included file, a jump host, a port, a key. Folders
that represent the cluster are not those where commands are called; SLURM_CONF is set for the remote shell alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from quickstart_model import link_quickstart_model, quickstart_model
from slurm_jobs import CONFIG, SMALL, ended, install_g2rl, read, wait_until

HERE, THERE = "only-where-it-is-launched-8d21", "only-in-a-file-on-the-cluster-5f07"
CHECK = f"""
[ "$HF_TOKEN" = {THERE} ] || echo the secret of the cluster is not there
env | grep -q {HERE} && echo the environment of the submitter is there
echo the disk is on fire >&2; exit 3
"""


@pytest.fixture(scope="module")
def sshd(slurm) -> Iterator[SimpleNamespace]:
    """An sshd on its own port, and a folder `bin` with an `ssh` that reads the configuration in `home`."""
    if not all(map(shutil.which, ("sshd", "ssh", "rsync"))):
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends openssh-server rsync"
        quiet = os.environ | dict(RUNLEVEL="1", DEBIAN_FRONTEND="noninteractive")  # the package starts no daemon
        done = subprocess.run(["sh", "-c", install], env=quiet, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"openssh-server and rsync cannot be installed: {done.stderr.strip()[-200:]}")
    folder = Path(tempfile.mkdtemp(prefix="g2rl-sshd-"))
    for name in ("host", "key", "wrong"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = dict(ListenAddress="127.0.0.1", Port=port, HostKey=folder / "host", PidFile=folder / "pid")
    server |= dict(AuthorizedKeysFile=folder / "key.pub", StrictModes="no", UsePAM="no", PasswordAuthentication="no")
    server |= dict(PermitRootLogin="yes", SetEnv=f"SLURM_CONF={os.environ['SLURM_CONF']}")
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in server.items()))
    (folder / "known").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    known = f"UserKnownHostsFile {folder / 'known'}"
    way = f"HostName 127.0.0.1\nPort {port}\nUser root\nIdentitiesOnly yes\n"
    (folder / "included").write_text(f"Host gate\n{way}{known}\nIdentityFile {folder / 'key'}\n")
    (folder / "config").write_text(
        f"Include {folder / 'included'}\n"
        f"Host login\n{way}{known}\nIdentityFile {folder / 'key'}\nProxyCommand ssh -W %h:%p gate\n"
        f"Host keyless\n{way}{known}\n"
        f"Host stranger\n{way}UserKnownHostsFile {folder / 'none'}\nIdentityFile {folder / 'key'}\n"
    )
    (folder / "bin").mkdir()
    # ssh looks for the user's configuration in the home folder of the password file, regardless of HOME.
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "config"} "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)
    subprocess.run([shutil.which("sshd"), "-f", folder / "sshd_config", "-E", folder / "log"], check=True)
    try:
        wait_until((folder / "pid").is_file, 300, "sshd begins")
        yield SimpleNamespace(folder=folder, bin=folder / "bin")
    finally:
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def site(slurm, sshd, nemo_run, environment, tmp_path):
    """Folders `here` and, on the cluster, `work` and `jobs`; `call(words, ...)` starts g2rl in the first."""
    here, work, jobs = tmp_path / "here", tmp_path / "cluster's $w rk", tmp_path / "jobs"
    own = {name: value for name, value in environment.items() if name != "SLURM_CONF"}
    own |= dict(HF_TOKEN=HERE, WANDB_API_KEY=HERE, PATH=f"{sshd.bin}:{environment['PATH']}")
    own |= dict(XDG_STATE_HOME=str(tmp_path / "state"), NEMORUN_HOME=str(tmp_path / "nemo"))
    for folder in (here, work):
        folder.mkdir()
        shutil.copy(CONFIG, folder / "my.yaml")
    link_quickstart_model(work)
    secrets = tmp_path / "secrets.sh"
    secrets.write_text(f"export HF_TOKEN={THERE}\n")
    profile = dict(account="local", time="00:10:00", nodes=1, stop_before_end_s=60, retries=0, folder=str(work))
    profile |= dict(tunnel=dict(kind="ssh", host="login", job_folder=str(jobs)))
    profile |= dict(secrets=["HF_TOKEN"], setup=[f". {secrets}"])
    profile |= dict(environment={name: environment[name] for name in ("XDG_CACHE_HOME", "PYTHONPATH")})

    def call(
        *words: str, cwd: Path = here, tunnel: dict | None = None, command: list[str] | None = None, **changes
    ) -> subprocess.Popen:
        changed = profile | changes | dict(tunnel=profile["tunnel"] | (tunnel or {}))
        changed["setup"] = [*install_g2rl(tmp_path, command), *profile["setup"]]
        (here / "site.yaml").write_text(json.dumps(changed))
        pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([sys.executable, "-m", "megatron_g2rl.cli", *words], env=own, cwd=cwd, **pipes)

    yield SimpleNamespace(call=call, here=here, work=work, jobs=jobs, folder=tmp_path, profile=here / "site.yaml")
    read("scancel", "--user=root")
    wait_until(lambda: not read("squeue", "--noheader"), 60, "jobs end")


LAUNCH = ("launch", "my.yaml", "--cluster", "site.yaml")


def holders(text: str, folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_a_training_over_ssh_finishes_and_is_monitored_and_no_secret_is_in_any_file(site):
    code, output = ended(site.call(*LAUNCH, "--wait", *SMALL, "trainer.steps=2"))
    assert code == 0, output
    assert (site.work / "runs" / "quickstart" / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert sorted(file.name for file in site.here.iterdir()) == ["my.yaml", "site.yaml"]
    assert "finished" in ended(site.call("status"))[1]
    assert "step" in ended(site.call("logs", "quickstart"))[1]
    assert (site.jobs / "quickstart").is_dir()
    assert holders(HERE, site.folder) == []
    assert holders(THERE, site.folder) == [site.folder / "secrets.sh"]


def test_a_job_over_ssh_has_only_the_clusters_secret_and_its_failure_is_reported(site):
    code, output = ended(site.call(*LAUNCH, "--wait", command=["bash", "-c", CHECK]))
    assert code == 3 and "the disk is on fire" in output, output
    assert "is not there" not in output and "is there" not in output, output


def test_a_run_over_ssh_is_listed_and_cancelled(site):
    code, output = ended(site.call(*LAUNCH, command=["bash", "-c", "sleep 500"]))
    assert code == 0, output
    jobs = site.work / "runs" / "quickstart" / "launch" / "jobs"
    wait_until(jobs.is_file, 300, lambda: read("squeue"))
    assert "running" in ended(site.call("status", "quickstart"))[1]
    code, output = ended(site.call(*LAUNCH))
    assert code == 1 and "is already running" in output, output
    assert "cancelled" in ended(site.call("cancel", "quickstart"))[1]
    wait_until(lambda: not read("squeue", "--noheader"), 300, lambda: read("squeue"))
    assert "cancelled" in ended(site.call("status", "quickstart"))[1]


def test_a_sweep_over_ssh_finishes(site):
    sweep = dict(config="my.yaml", cluster="site.yaml", concurrency=2, name="s{run.seed}", grid={"run.seed": [1, 2]})
    (site.here / "sweep.yaml").write_text(json.dumps(sweep))
    code, output = ended(site.call("sweep", "sweep.yaml", "--wait", command=["true"]))
    assert code == 0 and "2 finished" in output, output


def test_over_ssh_packager_git_sends_a_copy_of_the_last_commit(site):
    repository = site.folder / "repository"
    repository.mkdir()
    (repository / "sent.py").write_text("print('from the copy')\n")
    shutil.copy(CONFIG, repository / "my.yaml")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.com"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    show = "import os, sent, sys; print(os.getcwd()); sys.exit(not os.path.isfile(sys.argv[2]))"
    # models are too large to commit: an absolute path is not sent
    words = ("launch", "my.yaml", f"model.path={quickstart_model()}", "--cluster", "../here/site.yaml", "--wait")
    code, output = ended(site.call(*words, cwd=repository, packager="git", command=[sys.executable, "-c", show]))
    assert code == 0, output
    output = ended(site.call("logs", "quickstart"))[1]
    assert "from the copy" in output and str(site.jobs) in output, output


@pytest.mark.parametrize(
    "tunnel, message",
    [
        (dict(host="nowhere.invalid"), "nowhere.invalid cannot be reached: ssh: Could not resolve hostname"),
        (dict(host="keyless", identity="SSHD/wrong"), "keyless cannot be reached: root@127.0.0.1: Permission denied"),
        (dict(identity="SSHD/nothing"), "tunnel.identity: there is no file"),
        (dict(host="stranger"), "stranger cannot be reached: Host key verification failed"),
        (dict(job_folder="/dev/null/jobs"), "tunnel.job_folder: /dev/null/jobs cannot be created or written"),
        (dict(job_folder="/tmp/a b"), "tunnel.job_folder: /tmp/a b has to be an absolute path of letters"),
    ],
)
def test_an_unusable_tunnel_is_one_clear_error_before_anything_is_queued(site, sshd, tunnel, message):
    tunnel = {key: value.replace("SSHD", str(sshd.folder)) for key, value in tunnel.items()}
    code, output = ended(site.call(*LAUNCH, tunnel=tunnel))
    assert code in (1, 2) and message in output and "Traceback" not in output and len(output.splitlines()) <= 3, output
    assert not (site.folder / "nemo").exists() and not (site.work / "runs").exists()


def test_everything_missing_on_the_cluster_is_reported_before_anything_is_queued(site):
    (site.work / "my.yaml").write_text("trainer:\n  steps: 1\n")
    shutil.copy(CONFIG, site.here / "base.yaml")
    (site.here / "my.yaml").write_text("base: base.yaml\n")
    (site.work / "there.jsonl").touch()
    lacking = ["model.path=/lustre/model", "data.source=sums.jsonl", "evaluation.source=there.jsonl"]
    code, output = ended(site.call(*LAUNCH, *lacking))
    assert code == 2, output
    for part in (
        f"{site.work}/my.yaml differs from the local ",
        f"{site.work}/base.yaml, the configuration that jobs read, does not exist there",
        "model.path=/lustre/model: there is no such file or folder on login",
        "data.source=sums.jsonl: there is no such file or folder on login",
    ):
        assert part in output, output
    assert "evaluation.source" not in output, output
    code, output = ended(site.call(*LAUNCH, folder="/nowhere"))
    assert code == 2 and "folder: /nowhere does not exist there" in output, output


def test_output_of_the_remote_shells_start_files_is_reported(site, sshd):
    keys = sshd.folder / "key.pub"
    key = keys.read_text()
    keys.write_text(f'command="echo Welcome" {key}')
    try:
        code, output = ended(site.call(*LAUNCH, tunnel=dict(host="gate")))
    finally:
        keys.write_text(key)
    assert code == 2 and "the shell there prints 'Welcome'" in output, output
