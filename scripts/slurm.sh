#!/usr/bin/env bash
# One process on each host, which uses all of its GPUs:
#
#     sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh --config configs/voc_vgg16.py --workdir SHARED/runs/voc ...
#
# The arguments are those of train.py. --workdir and data.data_dir are on a file system that all hosts share, or gs://. Two
# minutes before the time is up, and when the job is preempted, the run saves itself and the job is queued again, until
# the run is finished.
#SBATCH --job-name=pwcrf
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
cd "${PWCRF_HOME:-$SLURM_SUBMIT_DIR}"
srun --kill-on-bad-exit=1 "${PYTHON:-python}" train.py --distributed "$@"
code=$?
# 143: stopped from outside and saved. (A process that was lost is for you to look at, and is not queued again.)
if [ "$code" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
