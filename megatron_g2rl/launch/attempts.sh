# What a job does around its ranks: it counts attempts and decides by itself whether the run goes on, with nobody
# watching. Part of every job script; reads G2RL_RUN (folder of the run), G2RL_LAUNCH (folder of its attempts),
# G2RL_LAUNCH_ID, G2RL_RETRIES and G2RL_CONTINUATION.

# Number of the newest complete checkpoint (its manifest is written last), 0 when there is none.
g2rl_step() {
  local folder step newest=0
  for folder in "$G2RL_RUN"/checkpoints/step_*; do
    [ -e "$folder/manifest.json" ] || continue
    step=${folder##*step_}
    [[ $step =~ ^[0-9]+$ ]] && (( 10#$step > newest )) && newest=$((10#$step))
  done
  echo "$newest"
}

g2rl_read() { cat "$G2RL_LAUNCH/$1" 2>/dev/null || echo "$2"; }
g2rl_write() { printf '%s\n' "$2" > "$G2RL_LAUNCH/$1.new" && mv -f "$G2RL_LAUNCH/$1.new" "$G2RL_LAUNCH/$1"; }
g2rl_say() { echo "g2rl launch: $*"; }

# Write down how an attempt ended: free with a newer checkpoint or at the end of the run, else one of the retries.
g2rl_account() {
  local code=$1 before after spent
  before=$(g2rl_read best_step 0) after=$(g2rl_step) spent=$(g2rl_read spent 0)
  if (( after > before )); then g2rl_write best_step "$after"
  elif [ "$code" != 0 ]; then spent=$((spent + 1)); g2rl_write spent "$spent"; fi
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$(g2rl_read running -)" "$code" "$before" "$after" \
    "$spent" >> "$G2RL_LAUNCH/attempts.tsv"
  rm -f "$G2RL_LAUNCH/running"
}

g2rl_show_error() {
  [ -s "$G2RL_LOG" ] || return 0
  g2rl_say "last lines of $G2RL_LOG:"
  tail -n 30 "$G2RL_LOG"
}

g2rl_begin() {
  local job=${SLURM_JOB_ID:-$$} restart=${SLURM_RESTART_COUNT:-${G2RL_RESTART:-0}} outcome
  mkdir -p "$G2RL_LAUNCH" || exit 1
  if [ "$(g2rl_read launch_id -)" != "$G2RL_LAUNCH_ID" ]; then  # launched anew: a new budget
    rm -f "$G2RL_LAUNCH"/{outcome,spent,running,cancelled}
    g2rl_write best_step "$(g2rl_step)"
    g2rl_write launch_id "$G2RL_LAUNCH_ID"
  fi
  outcome=$(g2rl_read outcome -)
  if [ "$outcome" != - ]; then  # a segment of a chain that has nothing left to do
    g2rl_say "nothing to do: $outcome"
    exit "${outcome##* }"
  fi
  if [ -e "$G2RL_LAUNCH/cancelled" ]; then g2rl_write outcome "cancelled 1"; exit 1; fi
  [ -e "$G2RL_LAUNCH/running" ] && g2rl_account lost  # the node, or the whole job, went away
  if (( $(g2rl_read spent 0) > G2RL_RETRIES )); then g2rl_write outcome "failed 1"; exit 1; fi
  rm -f "$G2RL_LAUNCH"/{stopped,exit_code,first_code}
  G2RL_LOG=$G2RL_LAUNCH/log-$job-$restart.out
  G2RL_SRUN_LOG=${G2RL_LOG//%/%%}  # srun expands %j and the like
  g2rl_write running "$job.$restart"
  printf '%s\n' "$job" >> "$G2RL_LAUNCH/jobs"
  g2rl_cancelled=0
  trap 'g2rl_cancelled=1' TERM INT
  trap g2rl_end EXIT
}

g2rl_end() {
  local code=$?
  trap - EXIT
  set +e +u +x +v
  if [ "$code" = 0 ] && [ -e "$G2RL_LAUNCH/stopped" ]; then code=75; fi
  if [ "$code" != 0 ]; then code=$(g2rl_read first_code "$code"); fi
  g2rl_account "$code"
  g2rl_say "attempt ended with $code at step $(g2rl_step); $(g2rl_read spent 0) of $G2RL_RETRIES retries spent"
  if [ "$code" = 0 ]; then g2rl_write outcome "finished 0"; exit 0; fi
  [ "$code" = 75 ] || g2rl_show_error
  if [ -e "$G2RL_LAUNCH/cancelled" ]; then
    g2rl_write outcome "cancelled $code"
  elif [ "$code" = 2 ]; then
    g2rl_say "the configuration cannot be used; trying again would not help"
    g2rl_write outcome "failed 2"
  elif (( $(g2rl_read spent 0) > G2RL_RETRIES )); then
    g2rl_say "all retries are spent"
    g2rl_write outcome "failed $code"
  elif [ "$g2rl_cancelled" = 1 ]; then
    g2rl_say "the job was told to end; Slurm requeues it if it was preempted"
  elif [ "$G2RL_CONTINUATION" = requeue ]; then
    g2rl_requeue "$code"
  elif [ "$G2RL_CONTINUATION" = none ]; then
    g2rl_write outcome "stopped $code"
  fi
  exit "$code"
}

g2rl_requeue() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    export G2RL_RESTART=$(( ${G2RL_RESTART:-0} + 1 ))
    exec bash "$G2RL_SCRIPT"
  fi
  scontrol requeue "$SLURM_JOB_ID" && return
  g2rl_say "this site does not requeue jobs: take continuation: chain in the profile, with several segments"
  g2rl_write outcome "stopped $1"
}
