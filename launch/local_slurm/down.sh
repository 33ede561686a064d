#!/usr/bin/env bash
# down.sh [FOLDER]: cancel the jobs of the Slurm that up.sh started in FOLDER, and stop its daemons by their pid files.
set -uo pipefail
cd "$(dirname "$0")"
. ./settings.sh

# stop NAME: end the daemon of NAME.pid and wait for it; a process of another name is left alone
stop() {
    alive "$1" || { rm -f "$RUN/$1.pid"; return 0; }
    kill -TERM "$(cat "$RUN/$1.pid")"
    until_true 30 dead "$1" && rm -f "$RUN/$1.pid"
}

no_jobs() { [ -z "$(timeout 5 squeue --noheader)" ]; }

# Jobs first: the processes of a job outlive the daemon that started them.
if alive slurmctld; then
    timeout 10 scancel --user="$(id -un)"
    until_true 20 no_jobs
fi
failed=0
for daemon in slurmd-n1 slurmd-n2 slurmctld slurmdbd mariadbd munged; do
    stop $daemon || failed=1
done
[ $failed = 0 ] && echo "local Slurm: down after $SECONDS s" >&2
exit $failed
