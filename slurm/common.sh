# shellcheck shell=bash
# Functions of a SLURM job: launch ranks and engines, write the status; sourced by a batch script in the project's folder.
#
#   OPO_RANKS_PER_NODE  default 8              OPO_PYTHON     default .venv/bin/python
#   OPO_MAX_RESTARTS    default 20             OPO_LOGS       default runs/slurm/JOB: status, attempt_N/*.log
#   OPO_CONTAINER       pyxis:IMAGE or apptainer:IMAGE; default none      OPO_MOUNTS     as for pyxis; include OPO_LOGS
#   OPO_ENGINE_NODES    default 0: number of nodes, the last ones, that serve SGLang and do not train
#
# The status is one line: running, completed, preempted, oom, timeout or failed, followed by the reason.
# Completed is a run whose rank 0 wrote that it came to its end (attempt_N/train.ranks); no exit code says that.
# Exit codes of the ranks that ask for a restart: 75, preempted and saved; 76, hung and stopped by the watchdog.

: "${OPO_RANKS_PER_NODE:=8}" "${OPO_MAX_RESTARTS:=20}" "${OPO_ENGINE_NODES:=0}" "${OPO_CONTAINER:=}"
: "${OPO_PYTHON:=$PWD/.venv/bin/python}" "${OPO_LOGS:=$PWD/runs/slurm/$SLURM_JOB_ID}"
case $OPO_LOGS in /*) ;; *) OPO_LOGS=$PWD/$OPO_LOGS ;; esac
export OPO_LOGS
attempt=${SLURM_RESTART_COUNT:-0}
logs=$OPO_LOGS/attempt_$attempt
step='' name='' code=0 limit='' engines=''
engine_keys=()

status() {
    printf '%s\n' "$1" >"$OPO_LOGS/status.new"
    mv "$OPO_LOGS/status.new" "$OPO_LOGS/status"
    printf '%(%F %T)T  attempt %s: %s\n' -1 "$attempt" "$1"
}

begin_attempt() {
    mkdir -p "$logs"
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    trainers=$((${#nodes[@]} - OPO_ENGINE_NODES))
    export OPO_RANKS_PER_NODE OPO_PYTHON OPO_NODES=$trainers
    export OPO_RENDEZVOUS="${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))"
    export OPO_RENDEZVOUS_ID="$SLURM_JOB_ID-$attempt"
    # SLURM signals only this shell, which forwards the signal to srun, srun to node.sh, node.sh to the ranks.
    trap 'limit=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
    status "running"
}

# in_step FIRST COUNT LOG COMMAND…: one task on each of COUNT nodes, starting at node FIRST.
in_step() {
    local first=$1 count=$2 log=$3 container=() list
    shift 3
    case $OPO_CONTAINER in
    pyxis:*) container=("--container-image=${OPO_CONTAINER#*:}" "--container-mounts=${OPO_MOUNTS:-$PWD:$PWD}"
        "--container-workdir=$PWD") ;;
    apptainer:*) export OPO_IMAGE=${OPO_CONTAINER#*:} ;;
    esac
    list=$(IFS=, && echo "${nodes[*]:first:count}")
    exec srun --overlap --nodelist="$list" --nodes="$count" --ntasks="$count" --ntasks-per-node=1 \
        --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=1 --output="$log" \
        ${container[@]+"${container[@]}"} bash slurm/node.sh "$@"
}

# launch NAME MODULE [ARGUMENTS…]: run the module in every rank of all training nodes; sets `code`.
launch() {
    name=$1
    shift
    export OPO_AGAIN="$logs/$name.again"
    export OPO_RANKS_FOLDER="$logs/$name.ranks"
    (trap - USR1 TERM && in_step 0 "$trainers" "${logs//%/%%}/$name-%n.log" "$@") &
    step=$!
    code=0
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # a signal interrupted the wait
        wait "$step" || true
    done
    [ "$code" -le 128 ] || { code=0 && wait "$step" || code=$?; }
    [ ! -e "$OPO_AGAIN" ] || code=$(<"$OPO_AGAIN")
    step=''
}

# address_of NODE: as this node, a trainer, resolves it; a node may know itself by its loopback alone.
address_of() {
    getent ahostsv4 "$1" | awk -v address="$1" 'NR == 1 { address = $1 } END { print address }' || true
}

# start_engines RECIPE [key=value…]: a server on each of the last OPO_ENGINE_NODES nodes; waits for them.
start_engines() {
    [ "$OPO_ENGINE_NODES" -gt 0 ] || return 0
    local port=$((10000 + SLURM_JOB_ID % 10000)) node address urls='' key=$logs/engine_key
    rm -f "$key" # of an earlier job with the same logs; the first server makes it anew
    engine_keys=("rollout.sglang.api_key_file=$key" rollout.sglang.transport=distributed)
    OPO_ENGINE_ADDRESSES=$(for node in "${nodes[@]:trainers}"; do address_of "$node"; done)
    export OPO_ENGINE_ADDRESSES
    (in_step "$trainers" "$OPO_ENGINE_NODES" "${logs//%/%%}/engine-%n.log" \
        --alone opo_megatron serve "$@" "${engine_keys[@]}" --port "$port") &
    engines=$! name=engine
    for address in $OPO_ENGINE_ADDRESSES; do
        until curl -fs "http://$address:$port/health" >/dev/null; do
            sleep 2
            kill -0 "$engines" 2>/dev/null || { code=1 && finish; }
            [ -z "$limit" ] || { code=75 && finish; }
        done
        urls+=",http://$address:$port"
    done
    engine_keys+=("rollout.sglang.urls=[${urls:1}]")
}

reason() {
    local line
    line=$(grep -hEm1 '^error|^[A-Za-z_.]+(Error|Exception|Failure)\b' "$logs/$name"-*.log 2>/dev/null | head -n 1)
    printf '%s' "${line:-exit code $code without a message}; see $logs"
}

# outcome: what rank 0 had not reached yet, or "exit CODE", the last thing that it does.
outcome() {
    head -qn 1 "$logs/$name.ranks"/node*/0.outcome 2>/dev/null || true
}

finish_unless_ready() {
    [ -z "$limit" ] || { code=75 && finish; }
    [ "$code" != 0 ] || [ "$(outcome)" = "exit 0" ] || code=1
    [ "$code" = 0 ] || { status "failed: preflight: $(reason)" && exit 1; }
}

finish() {
    [ -z "$engines" ] || { kill "$engines" 2>/dev/null || true; } && rm -f "$logs/engine_key"
    local again=''
    case $code in 75) again=preempted ;; 76) again="preempted: hung; $(reason)" ;; esac
    if [ "$code" = 0 ] && [ "$(outcome)" = "exit 0" ]; then
        status "completed" && exit 0
    elif [ "$code" = 0 ]; then
        status "failed: exit code 0 before $(outcome | grep . || echo 'its start'); see $logs"
    elif [ "$again" ] && [ "$attempt" -ge "$OPO_MAX_RESTARTS" ]; then
        status "failed: $again, after $attempt restarts, as many as OPO_MAX_RESTARTS=$OPO_MAX_RESTARTS allows"
    elif [ "$again" ]; then
        status "$again"
        trap - USR1 TERM
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM kills this shell meanwhile
        status "failed: SLURM did not requeue the job; submit it again with the same run.dir"
    elif [ "$code" = 137 ] || grep -qsE 'OutOfMemoryError|out of memory|oom[-_]kill' "$logs/$name"-*.log; then
        status "oom: $(reason)"
    elif [ -n "$limit" ]; then
        status "timeout: the ranks did not save before the limit; raise the seconds of --signal; see $logs"
    else
        status "failed: $(reason)"
    fi
    exit 1
}
