# When called with bash on a machine with sbatch, this file queues itself once per segment; all segments are one launch.
# Reads g2rl_name (of the run), g2rl_segments and g2rl_folder (of its attempts).
if [ -z "${SLURM_JOB_ID:-}" ]; then
  if [ -n "$(squeue --noheader --me --name="$g2rl_name" 2>/dev/null)" ]; then
    echo "a job called $g2rl_name is queued or running: wait for it, or cancel it with scancel --name=$g2rl_name" >&2
    exit 1
  fi
  launch=file-$(date +%s)-$$-$RANDOM
  for segment in $(seq "$g2rl_segments"); do
    job=$(sbatch --parsable --export=ALL,G2RL_LAUNCH_ID="$launch" "$0") || {
      echo "sbatch refused segment $segment of $g2rl_segments" >&2
      [ "$segment" = 1 ] || echo "the segments above are queued and will run; scancel removes them" >&2
      exit 1
    }
    echo "segment $segment of $g2rl_segments: job ${job%%;*}"
    mkdir -p "$g2rl_folder" && echo "${job%%;*}" >> "$g2rl_folder/jobs"
  done
  exit
fi
