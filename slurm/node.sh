#!/bin/bash
# node.sh MODULE [ARGUMENTS…]: the ranks of this node under torchrun; a task of srun.  Its exit code is that of the
# rank that failed first.  A code that asks for a restart is written to the file OPO_AGAIN; ranks that saved and
# exited (75) count as 0, because srun would kill nodes that are still shutting down.  With --alone: a server, without
# torchrun, at this node's of OPO_ENGINE_ADDRESSES.
set -uo pipefail
container=()
[ -z "${OPO_IMAGE:-}" ] || container=(apptainer exec --nv "$OPO_IMAGE")
python=(${container[@]+"${container[@]}"} "$OPO_PYTHON")
if [ "$1" = --alone ]; then
    mapfile -t addresses <<<"$OPO_ENGINE_ADDRESSES"
    exec "${python[@]}" -m "${@:2}" --host "${addresses[SLURM_PROCID]}"
fi
ranks=$OPO_RANKS_FOLDER/node${SLURM_NODEID:-0}
rm -rf "$ranks"
mkdir -p "$ranks"
trap : USR1 TERM # interrupts the wait below
(
    trap '' USR1 # SLURM may signal every process of a step; torchrun would die of it
    exec "${python[@]}" -m torch.distributed.run --nnodes="$OPO_NODES" --nproc-per-node="$OPO_RANKS_PER_NODE" \
        --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint="$OPO_RENDEZVOUS" --rdzv-id="$OPO_RENDEZVOUS_ID" \
        --no-python bash slurm/rank.sh "$ranks" "$OPO_PYTHON" -m "$@"
) &
torchrun=$!
wait "$torchrun"
while kill -0 "$torchrun" 2>/dev/null; do # stopping: signal the ranks, repeatedly, because some may still be starting
    for file in "$ranks"/*.pid; do
        [ ! -e "$file" ] || kill -USR1 "$(<"$file")" 2>/dev/null
    done
    sleep 2
done
wait "$torchrun"
code=$?
# Oldest first: later failures are consequences of the first.
while IFS= read -r file; do
    case $(<"$file") in
    0) ;;
    75) echo 75 >"$OPO_AGAIN" ;;
    76) echo 76 >"$OPO_AGAIN" && exit 76 ;;
    *) exit "$(<"$file")" ;;
    esac
done < <(find "$ranks" -name '*.code' -printf '%T@ %p\n' | sort -n | cut -d' ' -f2-)
exit "$code"
