#!/bin/bash
# task.sh COMMAND…: one process of a run. Rank 0 has a log of its own, the others share that of their node.
set -u
if [ "$SLURM_PROCID" = 0 ]; then log=rank-0; else log=$SLURMD_NODENAME; fi
exec "$@" >>"$LLADA_ATTEMPT/$log.log" 2>&1
