#!/usr/bin/env bash
# up.sh [FOLDER]: start a two-node Slurm with fake GPUs and accounting on this machine; see README.md.
# Running it again starts what is missing. All state and settings are in FOLDER; down.sh [FOLDER] stops it.
set -euo pipefail
cd "$(dirname "$0")"
. ./settings.sh
CPUS=8 GPUS=8

fail() { echo "local Slurm: $*" >&2; exit 1; }
[ "$(uname -s)" = Linux ] || fail "needs Linux"
[ "$(id -u)" = 0 ] || fail "needs root: the daemons start jobs, and device files are created"
[ ${#FOLDER} -le 60 ] || fail "the path is too long for the sockets in it, use one of at most 60 characters: $FOLDER"

install_packages() {
    local command missing=""
    for command in slurmctld slurmd slurmdbd sbatch sacct munged mariadbd mariadb-install-db; do
        command -v $command >/dev/null || missing+=" $command"
    done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "not found:$missing; without apt-get, install them yourself"
    # RUNLEVEL=1 keeps the packages from starting their daemons.
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    { apt-get -o DPkg::Lock::Timeout=120 update -qq && apt-get -o DPkg::Lock::Timeout=120 install -y -qq \
        --no-install-recommends slurmctld slurmd slurm-client slurmdbd munge mariadb-server; } \
        >"$FOLDER/log/apt.log" 2>&1 || { tail -n 5 "$FOLDER/log/apt.log" >&2; fail "packages cannot be installed"; }
}

write_settings() {
    local host port node gpu n=0
    host=$(hostname -s)
    # Ten ports that depend on the folder, below those used by jobs, so that clusters in different folders do not collide.
    port=$((10000 + $(cksum <<<"$FOLDER" | cut -d ' ' -f 1) % 900 * 10))
    cat >"$FOLDER/etc/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket
CredType=cred/munge
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool-%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd-%n.pid
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd-%n.log
# no systemd and no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass=$RUN/munge.socket
AccountingStoragePort=$((port + 1))
# the nodes have more nominal cores than the machine
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
# short times for interactive use: a lost node is detected soon and returns by itself
SlurmdTimeout=15
ReturnToService=2
KillWait=10
JobRequeue=1
GresTypes=gpu
# a job in urgent that needs the nodes preempts those in main: they get SIGTERM, have GraceTime to save, are requeued
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes=n[1-2] MaxTime=01:00:00 DefaultTime=00:10:00 State=UP
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
CONF
    : >"$FOLDER/etc/gres.conf"
    for node in $NODES; do
        n=$((n + 1))
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + n)) CPUs=$CPUS RealMemory=16000 \
Gres=gpu:$GPUS State=UNKNOWN" >>"$FOLDER/etc/slurm.conf"
        echo "NodeName=$node Name=gpu File=$FOLDER/gpus/gpu[0-$((GPUS - 1))]" >>"$FOLDER/etc/gres.conf"
    done
    # A GPU has to be a character device: these are copies of the null device.
    for gpu in $(seq 0 $((GPUS - 1))); do
        [ -c "$FOLDER/gpus/gpu$gpu" ] || mknod "$FOLDER/gpus/gpu$gpu" c 1 3 || fail "cannot create device files"
    done
    [ -e /etc/slurm/plugstack.conf ] && [ ! -e "$FOLDER/etc/plugstack.conf" ] && : >"$FOLDER/etc/plugstack.conf"
    cat >"$FOLDER/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.socket
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
LogFile=$FOLDER/log/slurmdbd.log
PidFile=$RUN/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageLoc=slurm
StorageUser=root
CONF
    chmod 600 "$FOLDER/etc/slurmdbd.conf"
    [ -s "$FOLDER/etc/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$FOLDER/etc/munge.key")
    echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")" >"$FOLDER/env.sh"
}

start_accounting() {
    alive munged || munged --force --socket="$RUN/munge.socket" --key-file="$FOLDER/etc/munge.key" \
        --pid-file="$RUN/munged.pid" --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/state/munged.seed" \
        2>>"$FOLDER/log/munged.log"
    if ! alive mariadbd; then
        [ -d "$FOLDER/mariadb/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$FOLDER/mariadb" \
            --skip-test-db --auth-root-authentication-method=socket >"$FOLDER/log/mariadb-install.log" 2>&1
        setsid nohup mariadbd --no-defaults --user=root --datadir="$FOLDER/mariadb" --socket="$SOCKET" --skip-networking \
            --pid-file="$RUN/mariadbd.pid" --innodb-buffer-pool-size=64M --innodb-log-file-size=16M \
            --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 >"$FOLDER/log/mariadbd.log" 2>&1 </dev/null &
        until_true 60 mariadb-admin --no-defaults --socket="$SOCKET" ping
    fi
    if ! alive slurmdbd; then
        mariadb --no-defaults --socket="$SOCKET" --execute="CREATE DATABASE IF NOT EXISTS slurm"
        MYSQL_UNIX_PORT=$SOCKET slurmdbd
    fi
    until_true 60 sacctmgr --immediate show cluster
    sacctmgr --immediate --quiet add cluster local >/dev/null || true # is there already
    sacctmgr --immediate --quiet add account local cluster=local >/dev/null || true
    sacctmgr --immediate --quiet add user "$(id -un)" account=local >/dev/null || true
}

start_nodes() {
    local node
    alive slurmctld || slurmctld
    for node in $NODES; do
        alive "slurmd-$node" || slurmd -N "$node"
    done
    until_true 30 nodes_are_up || {
        scontrol update nodename="$(tr ' ' ',' <<<"$NODES")" state=resume || true
        until_true 60 nodes_are_up
    }
}

nodes_are_up() { [ "$(sinfo --noheader --Node --partition=main --format=%T | grep -cE '^(idle|mixed|allocated|completing)$')" = 2 ]; }

umask 022
mkdir -p "$FOLDER"/{etc,run,log,state,gpus,spool-n1,spool-n2}
exec 9>"$FOLDER/lock"
flock 9
install_packages
write_settings
start_accounting 9>&-
start_nodes 9>&- || { sinfo --Node --long >&2; tail -n 20 "$FOLDER"/log/slurm*.log >&2; fail "the nodes did not come up"; }
echo "local Slurm: nodes $NODES are up after $SECONDS s" >&2
cat "$FOLDER/env.sh"
