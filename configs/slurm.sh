#!/usr/bin/env bash
# Train on several machines under Slurm: sbatch configs/slurm.sh --dataset_name ICFG-PEDES --root_dir /data
# What follows the file name goes to train.py, after the recipe. Change the sizes here or give them to sbatch.
#SBATCH --job-name=irra
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@180
set -euo pipefail

# one name for each job: after a requeue it finds its own run, and no other one's
name=${IRRA_NAME:-job$SLURM_JOB_ID}
logs=${IRRA_LOGS:-logs}
resume=()
if compgen -G "$logs/*/????????_??????_$name/last.pth" >/dev/null; then
    resume=(--resume)
fi

read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
gpus=${SLURM_GPUS_ON_NODE:-4}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# how long a process may take over its batch and last.pth after a SIGTERM; an older torchrun has 30 s, fixed
patience=()
if [[ $(torchrun --help 2>/dev/null) == *--shutdown?timeout* ]]; then
    patience=(--shutdown_timeout=120)
fi

# ${list[@]+…}: before bash 4.4 (CentOS 7) an empty list counts as unset
# --kill-on-bad-exit: when torchrun has given up on one machine the job ends
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$gpus" \
    --rdzv_backend=c10d --rdzv_endpoint="$head_node:${IRRA_PORT:-29500}" --rdzv_id="$SLURM_JOB_ID" \
    --max_restarts=3 ${patience[@]+"${patience[@]}"} \
    train.py --config_file configs/irra.yaml --num_workers 8 \
    --name "$name" --output_dir "$logs" ${resume[@]+"${resume[@]}"} "$@"
