#!/bin/sh
# Plain ssh: HOSTS="node0 node1" docs/launch/ssh.sh CONFIG [--field value ...]
#
# One process for each host, with all of its devices. Each host has this checkout in FOLDER, by
# default where it is here, and a Python with its dependencies on PATH; the folder of the run is one
# that all of them see. The first host coordinates, on PORT. Ends when all have ended, with the
# status of the first that failed. To stop a run with everything saved, send SIGTERM to any one of
# its processes.
set -u
: "${HOSTS:?say which, as in HOSTS=\"node0 node1\"}"
folder=${FOLDER:-$(cd "$(dirname "$0")/../.." && pwd)}
port=${PORT:-8476}
first=${HOSTS%% *}
count=$(echo "$HOSTS" | wc -w | tr -d ' ')

# ssh joins its arguments to one line for the other shell, so each is quoted for that.
quoted=
for argument; do
    quoted="$quoted '$(printf %s "$argument" | sed "s/'/'\\\\''/g")'"
done

rank=0 running=
for host in $HOSTS; do
    ssh "$host" "cd '$folder' && JAX_COORDINATOR_ADDRESS=$first:$port \
JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$rank \
python -m models.supervise --restarts 10 -- python -m models.train$quoted" &
    running="$running $!"
    rank=$((rank + 1))
done

status=0
for process in $running; do
    wait "$process" || { ended=$?; [ "$status" -ne 0 ] || status=$ended; }
done
exit "$status"
