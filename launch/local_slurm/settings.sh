# Shared by up.sh and down.sh: the folder of the cluster's state, and the check whether a pid file is still valid.
FOLDER=$(realpath -m "${1:-${TMPDIR:-/tmp}/local-slurm}")
RUN=$FOLDER/run
SOCKET=$RUN/mariadb.sock
NODES="n1 n2"
export SLURM_CONF=$FOLDER/etc/slurm.conf

# alive NAME: whether the process in NAME.pid is running and is that daemon. The pid may have been reused by another
# process, or may belong to a zombie.
alive() {
    local pid
    pid=$(cat "$RUN/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%%-*}" ] &&
        ! grep -q '^State:.Z' "/proc/$pid/status"
}

dead() { ! alive "$1"; }

# until_true SECONDS COMMAND...: repeat the command until it succeeds
until_true() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || { echo "gave up after waiting for: $*" >&2; return 1; }
        sleep 0.1
    done
}
