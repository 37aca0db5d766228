#!/usr/bin/env bash
# Train on several hosts: run this on each of them, with the same settings but NODE_RANK.
#
#   NODE_RANK=0 NUM_NODES=2 MASTER_ADDR=10.0.0.1 PROCESSES_PER_NODE=8 launch/multinode.sh --model bigrec
#   NODE_RANK=1 NUM_NODES=2 MASTER_ADDR=10.0.0.1 PROCESSES_PER_NODE=8 launch/multinode.sh --model bigrec
#
#   NODE_RANK           this host's number, from 0
#   NUM_NODES           how many hosts there are
#   MASTER_ADDR         name or address of host 0, as the others reach it
#   MASTER_PORT         a port that is free on host 0 and open to the others (29500)
#   PROCESSES_PER_NODE  processes on each host, one a GPU (as many as this host has GPUs, or 1)
#   CONFIG              Accelerate configuration (launch/accelerate/multinode.yaml)
#   JOIN_SECONDS        how long the hosts wait for each other (600)
#
# What follows the name of the script goes to launch/train.py. Relative paths start at the clone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "launch/multinode.sh: $*" >&2
    exit 2
}

require_number() { # its name, its least value, what it is
    [[ "${!1:-}" =~ ^[0-9]+$ ]] || fail "$1 is '${!1:-}', expected $3: NODE_RANK=0 NUM_NODES=2 MASTER_ADDR=... $0"
    ((${!1} >= $2)) || fail "$1 is ${!1}, but must be at least $2: it is $3"
}

count_gpus() {
    python -c 'import torch; print(max(1, torch.accelerator.device_count()))'
}

MASTER_PORT=${MASTER_PORT:-29500}
CONFIG=${CONFIG:-launch/accelerate/multinode.yaml}
JOIN_SECONDS=${JOIN_SECONDS:-600}
require_number NUM_NODES 1 "the number of hosts"
require_number NODE_RANK 0 "this host's number, from 0"
require_number MASTER_PORT 1 "a port that is free on host 0"
require_number JOIN_SECONDS 1 "the seconds that hosts wait for each other"
((NODE_RANK < NUM_NODES)) || fail "NODE_RANK is $NODE_RANK, but the last of NUM_NODES=$NUM_NODES hosts is $((NUM_NODES - 1))"
[[ -n "${MASTER_ADDR:-}" ]] || fail "MASTER_ADDR is not set, expected the name or address of host 0"
[[ -f "$CONFIG" ]] || fail "CONFIG is $CONFIG, which is not a file; launch/accelerate/ has some"
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-$(count_gpus)}
require_number PROCESSES_PER_NODE 1 "the number of processes on each host"

# Host 0 may start later. Who cannot reach it learns so here; host 0 itself counts the others in the launcher.
wait_for_host_0() {
    local deadline=$((SECONDS + JOIN_SECONDS))
    until timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$MASTER_ADDR" "$MASTER_PORT" 2>/dev/null; do
        ((SECONDS < deadline)) || fail "host $NODE_RANK of $NUM_NODES could not reach $MASTER_ADDR port $MASTER_PORT" \
            "for $JOIN_SECONDS s. Check that host 0 runs this script with NODE_RANK=0 and the same MASTER_PORT, that" \
            "MASTER_ADDR is its address as seen from here, and that no firewall is between; JOIN_SECONDS waits longer"
        sleep 1
    done
}

((NODE_RANK == 0)) || wait_for_host_0

# launch/train.py compares this with the number of processes that joined: hosts that train alone are refused.
export SHARDREC_WORLD_SIZE=$((NUM_NODES * PROCESSES_PER_NODE))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}   # on SIGTERM: time to save, not 30 s
echo "launch/multinode.sh: host $NODE_RANK of $NUM_NODES at $MASTER_ADDR port $MASTER_PORT. All have $JOIN_SECONDS s" \
    "to join; if fewer do, check that every host runs this script, each with a NODE_RANK of its own and with the same" \
    "NUM_NODES, MASTER_ADDR and MASTER_PORT; JOIN_SECONDS waits longer" >&2

exec accelerate launch \
    --config_file "$CONFIG" \
    --num_machines "$NUM_NODES" \
    --machine_rank "$NODE_RANK" \
    --main_process_ip "$MASTER_ADDR" \
    --main_process_port "$MASTER_PORT" \
    --num_processes "$SHARDREC_WORLD_SIZE" \
    --deepspeed_multinode_launcher standard \
    --rdzv_conf "timeout=$JOIN_SECONDS" \
    --same_network \
    launch/train.py "$@"
