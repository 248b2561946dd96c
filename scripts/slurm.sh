#!/usr/bin/env bash
# Training on several machines under Slurm, one launcher on each: sbatch --nodes 2 scripts/slurm.sh CONFIG [OPTION ...]
# LAUNCHER: ddp (the default), fsdp2, zero2 or zero3, as in configs/accelerate. The run folder lies on a disk that all share.
#SBATCH --job-name=clpl-moe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
. "${VENV:-.venv}/bin/activate"
config=${1:?name a config}
shift

gpus=${SLURM_GPUS_ON_NODE:-8}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A job that Slurm ends saves a checkpoint first. Submitted again, it goes on from there; a new run begins.
command=(-m clpl_moe.train --config "$config" --resume_from_checkpoint true "$@")
if [ "${LAUNCHER:-ddp}" = ddp ]; then
    launch=(torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$gpus" --rdzv_backend c10d
        --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" "${command[@]}")
    srun --kill-on-bad-exit=1 "${launch[@]}"
else
    # accelerate is told each machine's number, which only the machine knows.
    export GPUS=$((gpus * SLURM_JOB_NUM_NODES)) FIRST=$first
    srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "configs/accelerate/$LAUNCHER.yaml" \
        --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$GPUS" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$FIRST" --main_process_port 29500 "$@"' launch "${command[@]}"
fi
