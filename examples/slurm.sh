#!/bin/bash
# One training job on all hosts of an allocation; the options of `fasttrain train` follow:
#     sbatch slurm.sh --device cuda --zero 1 --batch 1024 --text /shared/text --out /shared/runs/first
#SBATCH --job-name=fasttrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # one torchrun on each host; it starts the processes
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# export NCCL_SOCKET_IFNAME==ens1f0 GLOO_SOCKET_IFNAME=ens1f0   # where a host has several networks
first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The host of the endpoint keeps the store in which all meet; a port by the job's number does not meet another job's.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${PROCESSES_PER_HOST:-$SLURM_GPUS_ON_NODE}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first_host:$((20000 + SLURM_JOB_ID % 10000))" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 \
    -m fasttrain train "$@"
