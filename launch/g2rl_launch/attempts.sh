# The part of every job script that runs around the ranks: it counts attempts and decides whether the run continues,
# unattended. Reads G2RL_RUN (folder of the run), G2RL_LAUNCH (folder of its attempts), G2RL_LAUNCH_ID, G2RL_RETRIES,
# G2RL_CONTINUATION and G2RL_SIGNAL_S: seconds after a job's start from which on the time limit's signal may arrive.

# Step of the latest complete checkpoint (its manifest is written last), 0 when there is none.
g2rl_step() {
  local folder step latest=0
  for folder in "$G2RL_RUN"/checkpoints/step_*; do
    [ -e "$folder/manifest.json" ] || continue
    step=${folder##*step_}
    [[ $step =~ ^[0-9]+$ ]] && (( 10#$step > latest )) && latest=$((10#$step))
  done
  echo "$latest"
}

g2rl_read() { cat "$G2RL_LAUNCH/$1" 2>/dev/null || echo "$2"; }
g2rl_write() { printf '%s\n' "$2" > "$G2RL_LAUNCH/$1.new" && mv -f "$G2RL_LAUNCH/$1.new" "$G2RL_LAUNCH/$1"; }
g2rl_say() { echo "g2rl launch: $*"; }

# Number of finished response groups of unfinished steps; an attempt that was stopped during rollouts increases it.
g2rl_groups() { cat "$G2RL_RUN"/rollouts/*.jsonl 2>/dev/null | wc -l; }

# The last output of the ranks: error messages if there are any, in a fixed order, since ranks end in any order. That a
# rank was asked to stop, or lost the connection to another one, is shown only if there is nothing else.
g2rl_error() {
  local lines
  lines=$(tail -n 100 "$G2RL_LOG" 2>/dev/null | grep -avE '^((srun|slurmstepd[^ :]*|bash): |SIG[A-Z0-9]+: |(Terminated|Killed)$)' |
    sed 's/^rank [0-9]*: //')
  grep -aE '^[A-Za-z_.]*(Error|Exception)\b' <<< "$lines" | sort -u | grep . ||
    grep -avE '^(g2rl launch: |the connection to another rank is lost|[[:space:]]*$)' <<< "$lines" | tail -n 1 | grep . ||
    grep -avE '^(g2rl launch: |[[:space:]]*$)' <<< "$lines" | tail -n 1 | grep . ||
    tail -n 1 "$G2RL_LOG" 2>/dev/null  # ranks have not started: Slurm's message
}

# Record how an attempt ended. It uses up a retry unless it advanced or finished the run, was preempted or cancelled, or
# was asked to stop after it had finished more groups.
g2rl_account() {
  local code=$1 before after spent
  before=$(g2rl_read best_step 0) after=$(g2rl_step) spent=$(g2rl_read spent 0)
  g2rl_advanced=1 g2rl_uncounted=0
  if (( after > before )); then g2rl_write best_step "$after" || g2rl_uncounted=1
  elif g2rl_was_stopped "$code" && [ ! -e "$G2RL_LAUNCH/overrun" ] &&
    { [ "${g2rl_cancelled:-0}" = 1 ] || g2rl_preempted; }; then :  # not its own failure
  elif g2rl_was_stopped "$code" && (( $(g2rl_groups) > ${g2rl_groups_before:-0} )); then :
  elif [ "$code" != 0 ]; then g2rl_advanced=0 spent=$((spent + 1)); g2rl_write spent "$spent" || g2rl_uncounted=1; fi
  printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$(g2rl_read running -)" "$code" "$before" "$after" \
    "$spent" >> "$G2RL_LAUNCH/attempts.tsv"
  rm -f "$G2RL_LAUNCH/running"
}

# Whether it was asked to stop: 75, or 143 (SIGTERM) if the program did not handle signals yet.
g2rl_was_stopped() { [ "$1" = 75 ] || [ "$1" = 143 ]; }

# Whether a more urgent job took the nodes. With a grace time, Slurm signals only the ranks, not this script.
g2rl_preempted() {
  [ -n "${SLURM_JOB_ID:-}" ] && grep -q 'PreemptTime=[0-9]' <<< "$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null)"
}

# Whether the attempt that just ended shows that another one would not help; reports why. A time limit that is too short
# for one step is detected after two attempts: the first may have loaded from a cold disk.
g2rl_is_hopeless() {
  local code=$1 now=- last
  last=$(g2rl_read last_end -)
  if [ "$code" = 2 ]; then
    [ -s "$G2RL_LAUNCH/reason" ] || g2rl_because "the configuration cannot be used; trying again would not help"
    return 0
  elif [ "$g2rl_advanced" = 0 ] && g2rl_was_stopped "$code" && [ -n "${G2RL_SIGNAL_S:-}" ] &&
    (( SECONDS >= G2RL_SIGNAL_S )); then
    now="time limit"
    g2rl_because "the time limit leaves no time for a step: asked to stop $SECONDS s after its start, the attempt had" \
      "nothing to save. Raise time or lower stop_before_end_s in the profile"
  fi
  g2rl_write last_end "$now"
  [ "$now" != - ] && [ "$now" = "$last" ]
}

g2rl_because() {
  g2rl_write reason "$*"
  g2rl_say "$*"
}

# A failed line of the site's setup ends the attempt: ranks would start in the wrong environment.
g2rl_setup() {
  [ "$1" = 0 ] && return
  g2rl_because "setup failed with $1: $2"
  exit 1
}

# A secret that is not set ends the run: no later attempt would have it. The value is in no output, traced or not.
g2rl_secret() {
  [ -n "${!1:+set}" ] && return
  g2rl_because "$1 is not set where the job was submitted, nor by setup"
  exit 2
}

# Slurm does not requeue a job that reaches its time limit, so ranks that are still running then (a stalled file system,
# a step longer than stop_before_end_s) would end the run. The job is therefore requeued just before the limit.
g2rl_watch_limit() {
  local ends left pause
  trap '[ -z "${pause:-}" ] || kill "$pause"; exit' TERM
  while ends=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.* EndTime=\([^ ]*\) .*/\1/p'); do
    ends=$(date -d "${ends:-now + 1 hour}" +%s 2>/dev/null) || return 0  # there is no limit
    left=$((ends - $(date +%s) - ${G2RL_REQUEUE_BEFORE_S:-15}))
    if (( left <= 0 )); then
      : > "$G2RL_LAUNCH/overrun"
      g2rl_because "ranks had not ended shortly before the time limit; requeued. Raise stop_before_end_s in the profile" \
        "if a step and a save take longer"
      scontrol requeue "$SLURM_JOB_ID"
      return 0
    fi
    sleep $((left < 60 ? left : 60)) &  # the limit may be changed
    pause=$!
    wait "$pause"
  done
}

# Without its servers a run would wait forever: ask the ranks to save and stop. When the job ends, servers end too. The
# signal is repeated, because it is lost while the ranks' step does not exist yet.
g2rl_server_ended() {
  [ "$1" = 143 ] || [ "$1" = 137 ] && return
  g2rl_because "servers ended with $1 while ranks ran: ${G2RL_SRUN_LOG/log-/server-} has their output"
  while [ -e "$G2RL_LAUNCH/running" ]; do
    scancel --signal=TERM "$SLURM_JOB_ID"
    sleep 10
  done
}

# Two jobs of one run (launched twice in the same second, or manually) would use up each other's retries.
g2rl_refuse_second() {
  local other
  other=$(g2rl_read running "$1") other=${other%%.*}
  [ "$other" != "$1" ] || return 0
  [ -n "$(squeue --noheader --jobs="$other" --states=RUNNING 2>/dev/null)" ] || return 0
  g2rl_say "job $other of this run is running; nothing was done"
  exit 1
}

g2rl_begin() {
  local job=$SLURM_JOB_ID restart=${SLURM_RESTART_COUNT:-0} outcome
  mkdir -p "$G2RL_LAUNCH" || exit 1
  g2rl_refuse_second "$job"
  if [ "$(g2rl_read launch_id -)" != "$G2RL_LAUNCH_ID" ]; then  # launched again: a new budget
    rm -f "$G2RL_LAUNCH"/{outcome,spent,running,cancelled,reason,last_end}
    g2rl_write best_step "$(g2rl_step)"
    g2rl_write launch_id "$G2RL_LAUNCH_ID"
  fi
  outcome=$(g2rl_read outcome -)
  if [ "$outcome" != - ]; then  # a segment of a chain with nothing left to do
    g2rl_say "nothing to do: $outcome"
    exit "${outcome##* }"
  fi
  if [ -e "$G2RL_LAUNCH/cancelled" ]; then g2rl_write outcome "cancelled 1"; exit 1; fi
  [ -e "$G2RL_LAUNCH/running" ] && g2rl_account lost  # the node, or the entire job, was lost
  if (( $(g2rl_read spent 0) > G2RL_RETRIES )); then
    g2rl_because "all retries are spent: the last attempt was lost with its node or its entire job"
    g2rl_write outcome "failed 1"
    exit 1
  fi
  rm -f "$G2RL_LAUNCH"/{stopped,exit_code,first_code,reason,overrun}
  G2RL_LOG=$G2RL_LAUNCH/log-$job-$restart.out
  G2RL_SRUN_LOG=${G2RL_LOG//%/%%}  # srun expands %j and the like
  g2rl_write running "$job.$restart"
  printf '%s\n' "$job" >> "$G2RL_LAUNCH/jobs"
  g2rl_cancelled=0 g2rl_groups_before=$(g2rl_groups)
  g2rl_watch=
  # The output of setup, srun and this script goes to the attempt's log, too; srun appends to it.
  exec >> "$G2RL_LOG" 2>&1
  export SLURM_OPEN_MODE=a
  if [ "$G2RL_CONTINUATION" = requeue ]; then
    g2rl_watch_limit &
    g2rl_watch=$!
  fi
  trap 'g2rl_cancelled=1' TERM INT
  trap g2rl_end EXIT
}

g2rl_end() {
  local code=$?
  trap - EXIT
  set +e +u +x +v
  [ -z "$g2rl_watch" ] || kill "$g2rl_watch" 2>/dev/null
  if [ "$code" = 0 ] && [ -e "$G2RL_LAUNCH/stopped" ]; then code=75; fi
  if [ "$code" != 0 ]; then code=$(g2rl_read first_code "$code"); fi
  g2rl_account "$code"
  g2rl_say "attempt ended with $code at step $(g2rl_step); $(g2rl_read spent 0) of $G2RL_RETRIES retries spent"
  if [ "$code" = 0 ]; then g2rl_write outcome "finished 0"; exit 0; fi
  if [ -e "$G2RL_LAUNCH/cancelled" ]; then
    g2rl_write outcome "cancelled $code"
  elif g2rl_is_hopeless "$code"; then
    g2rl_write outcome "failed $code"
  elif (( $(g2rl_read spent 0) > G2RL_RETRIES )); then
    g2rl_because "all retries are spent: $(g2rl_error | tail -n 1)"
    g2rl_write outcome "failed $code"
  elif [ -e "$G2RL_LAUNCH/overrun" ]; then :  # requeued already
  elif [ "$g2rl_cancelled" = 1 ]; then
    g2rl_say "the job was asked to end; Slurm requeues it if it was preempted"
  elif [ "${g2rl_uncounted:-0}" = 1 ]; then  # it would be tried forever
    g2rl_because "nothing can be written in $G2RL_LAUNCH, so retries cannot be counted: is the disk full?"
    g2rl_write outcome "failed $code"
  elif [ "$G2RL_CONTINUATION" = requeue ]; then
    g2rl_requeue "$code"
  elif [ "$G2RL_CONTINUATION" = none ]; then
    g2rl_write outcome "stopped $code"
  fi
  exit "$code"
}

g2rl_requeue() {
  local answer _
  for _ in {1..20}; do  # the controller may be busy, or restarting
    if answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then echo "$answer"; return; fi
    g2rl_say "scontrol requeue: $answer"
    [[ $answer == *disabled* || $answer == *"not found"* ]] && break
    sleep "${G2RL_REQUEUE_S:-6}"
  done
  g2rl_because "Slurm did not requeue the job ($answer): launch it again to resume. A site that never requeues needs" \
    "continuation: chain in the profile, with several segments"
  g2rl_write outcome "stopped $1"
}
