#!/bin/sh
# Slurm: sbatch docs/launch/slurm.sh CONFIG [--field value ...], in the checkout.
#
# One task for each GPU. Slurm's variables tell jax how many tasks there are, which one this is and
# where the first one runs; nothing has to be named. Five minutes before the time is over, Slurm sends
# SIGTERM: the run saves and leaves with status 75, and the job is put in the queue again.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

srun python -m models.supervise --restarts 10 -- \
    python -m models.train "$@" --watch.on-stall abort --watch.preempted-status 75
status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
