#!/usr/bin/env bash
# Called by the .sbatch files: one task for each GPU, and the job again after a time limit or a preemption.
#   bash scripts/slurm/run.sh SCRIPT [WORDS...]
# SLURM starts the processes itself, so their exit status arrives here: 138 after SIGUSR1 (--signal: seconds before the time
# limit), 143 after SIGTERM (preemption). Both mean that a checkpoint is written and that the same command goes on from it.
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 2
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

trap : TERM USR1  # for the tasks; this shell waits for them
# shellcheck disable=SC2016  # expanded by the shell of each task
srun --kill-on-bad-exit=1 bash -c '
  export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
  export LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE%%[(,]*}"
  exec python3 "$@"' task "$@"
status=$?

case "$status" in
  138 | 143)
    echo "Job $SLURM_JOB_ID ended with status $status, its checkpoint is written: requeued."
    scontrol requeue "$SLURM_JOB_ID"
    ;;
  *) exit "$status" ;;
esac
