#!/bin/bash
# rank.sh FOLDER COMMAND…: one rank.  Its process id and exit code are written to FOLDER, for node.sh; the rank
# itself writes there what it has not reached yet, and at last the exit code that it ends with.  A code that it
# did not write is somebody's call of exit in it, which is an error (1 is Python's own, with a traceback).
own=$1/$RANK
shift
OPO_OUTCOME_FD=9 "$@" 9>"$own.outcome" &
echo $! >"$own.pid"
wait $!
code=$?
outcome=$(head -n 1 "$own.outcome")
if [ "$code" -ne 1 ] && [ "$code" -le 128 ] && [ "$outcome" != "exit $code" ]; then
    echo "error: rank $RANK ended with exit code $code before ${outcome:-its start}: something in its process" \
        "called exit; remove that call and repeat the command (a run resumes with resume=auto)" >&2
    code=1
fi
echo "$code" >"$own.code"
[ "$code" = 75 ] && exit 0 # torchrun would kill the ranks that are still shutting down
exit "$code"
