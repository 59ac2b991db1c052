#!/bin/bash
#SBATCH --job-name=bsnas
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# One process per GPU. Sent away, the run saves, exits with 75 and is put into the queue again.
# Submit it from the repository, with the environment in .venv: sbatch docs/slurm.sh
set -uo pipefail
DATA=${DATA:-/data/imagenet}
RUN=${RUN:-/shared/runs/imagenet}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export DATA RUN MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

train() {
    srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec .venv/bin/python "$@"' \
        rank engine/train.py "$@"
}

if [ -f "$RUN/config.json" ]; then
    train --run "$RUN" --resume
else
    train --preset imagenet --data.path "$DATA" --run "$RUN"
fi
code=$?
# srun reports the highest exit code of its processes.
if [ $code -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
