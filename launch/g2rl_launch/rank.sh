# Runs the program of each rank, which is given with its arguments.
# Signals are for the program; the shell ignores them and waits for it.
trap : TERM USR1 HUP
"$@"
code=$?
# Saved and stopped: exit with 0, because after a failure srun would kill the ranks that are still saving.
if [ "$code" = 75 ]; then : > "$G2RL_LAUNCH/stopped" && exit 0; exit 75; fi
# srun reports the largest exit code, that of the ranks it killed; record the code of the rank that failed first.
if [ "$code" != 0 ]; then (set -C; echo "$code" > "$G2RL_LAUNCH/first_code") 2>/dev/null; fi
exit "$code"
