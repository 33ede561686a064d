# Slurm's own address of a node: the others may not be able to look up its name.
g2rl_address() {
  local found
  found=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  echo "${found:-$1}"
}
# All ranks meet on the first node. Jobs that share a node use different ports; the system assigns none of these.
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  MASTER_ADDR=$(g2rl_address "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
  export MASTER_ADDR MASTER_PORT="$((20000 + SLURM_JOB_ID % 6000))"
fi
