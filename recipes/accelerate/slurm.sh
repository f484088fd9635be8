#!/bin/bash
# Several nodes under Slurm: one launcher on each, which starts a process for each of its GPUs.
#
#     sbatch --nodes 4 --gpus-per-node 8 recipes/accelerate/slurm.sh recipes/finetune.py training.bf16=true --output-dir SHARED_FOLDER
#
# The output folder must be on a disk that all nodes see. Slurm's SIGTERM before the time limit makes a checkpoint; submitted again, the
# run resumes, also with another number of nodes if the global batch stays the same. For sharded training set
# CONFIG=recipes/accelerate/fsdp2.yaml.
#
# Never tried: we have had no Slurm cluster. What is tried is the same launch on two network namespaces of one machine without Slurm
# (two_nodes.yaml), and this script's syntax.
#SBATCH --job-name=kt_hf
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-1}
export CONFIG=${CONFIG:-recipes/accelerate/two_nodes.yaml}
export FIRST=$first PORT=$((20000 + SLURM_JOB_ID % 20000)) PROCESSES=$((SLURM_NNODES * gpus))

srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" \
    --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST" --main_process_port "$PORT" "$@"' \
    launch "$@"
