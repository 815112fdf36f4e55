#!/bin/bash
# rank.sh FOLDER COMMAND…: one rank.  Its process id and exit code are written to FOLDER, for node.sh.
folder=$1
shift
"$@" &
echo $! >"$folder/$LOCAL_RANK.pid"
wait $!
code=$?
echo "$code" >"$folder/$LOCAL_RANK.code"
[ "$code" = 75 ] && exit 0 # torchrun would kill the ranks that are still shutting down
exit "$code"
