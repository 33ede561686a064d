# The address of a node as Slurm knows it: other nodes may not be able to resolve its name.
g2rl_address() {
  local address
  address=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  echo "${address:-$1}"
}
# The rendezvous is on the first node. Jobs that share a node use different ports, outside the ephemeral range.
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  MASTER_ADDR=$(g2rl_address "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
  export MASTER_ADDR MASTER_PORT="$((20000 + SLURM_JOB_ID % 6000))"
fi
