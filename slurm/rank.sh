#!/bin/bash
# rank.sh FOLDER COMMAND…: one rank.  Its process id and exit code go to FOLDER, where node.sh looks.
folder=$1
shift
"$@" &
echo $! >"$folder/$LOCAL_RANK.pid"
wait $!
code=$?
echo "$code" >"$folder/$LOCAL_RANK.code"
[ "$code" = 75 ] && exit 0 # torchrun would end the ranks that are still leaving
exit "$code"
