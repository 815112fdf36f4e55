#!/bin/bash
# Trains a recipe on a SLURM cluster, and resumes in the same job after every time limit:
#   sbatch slurm/opo_70b.sh [RECIPE] [key=value…]                  (from the project's folder)
# Options on sbatch's command line override those below; common.sh documents the OPO_* variables.
#SBATCH --job-name=opo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=opo-%j.out

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
[ -f slurm/common.sh ] || { echo "error: no slurm/common.sh in $PWD; submit from the project's folder" >&2 && exit 2; }
source slurm/common.sh
recipe=${1:-recipes/opo_llama3_70b.yaml}
shift || true
begin_attempt
launch preflight opo_megatron preflight "$recipe" resume=auto "$@"
finish_unless_ready
start_engines "$recipe" "$@"
launch train opo_megatron train "$recipe" resume=auto ${engine_keys[@]+"${engine_keys[@]}"} "$@"
finish
