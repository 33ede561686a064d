# Runs around the program of each rank; its arguments are the program and its arguments.
# A signal is for the program; the shell waits for it.
trap : TERM USR1 HUP
"$@"
code=$?
# Saved and stopped: not a failure, for which srun would kill the ranks that are still saving.
if [ "$code" = 75 ]; then : > "$G2RL_LAUNCH/stopped"; exit 0; fi
# srun reports the largest code, that of ranks it killed; the cause is the rank that failed first.
if [ "$code" != 0 ]; then (set -C; echo "$code" > "$G2RL_LAUNCH/first_code") 2>/dev/null; fi
exit "$code"
