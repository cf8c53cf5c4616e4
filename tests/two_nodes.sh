#!/usr/bin/env bash
# Runs torchrun on two machines, as far as their network, names and hosts files go: namespaces of this one.
#
#   unshare --user --map-root-user --net --mount --uts --pid --fork --kill-child bash two_nodes.sh FOLDER COMMAND…
#
# NODE_RANK in the command is 0 on one and 1 on the other. They are called node-0 and node-1, at 10.77.0.1 and 10.77.0.2;
# each takes its own name for the loopback's, as Debian has it. What node N says goes to FOLDER/node_N.log, and its exit
# code after it. Exits with 0 if both do.
set -euo pipefail
folder=$1
shift
mount -t proc proc /proc

settle() { # in the namespaces of node $1
    hostname "node-$1"
    printf '127.0.0.1 localhost\n127.0.1.1 node-%s\n10.77.0.%s node-%s\n' "$1" "$((2 - $1))" "$((1 - $1))" >"$folder/hosts_$1"
    mount --bind "$folder/hosts_$1" /etc/hosts
    mount --bind /dev/null /etc/resolv.conf # no name server answers here, which takes seconds to find out
    ip link set lo up
    ip address add "10.77.0.$(($1 + 1))/24" dev wire
    ip link set wire up
    ip route add default dev wire
}

work() { # as node $1
    local rank=$1 code=0
    shift
    "${@//NODE_RANK/$rank}" >"$folder/node_$rank.log" 2>&1 || code=$?
    echo "exit code $code" >>"$folder/node_$rank.log"
    return "$code"
}
export folder
export -f settle work

coproc other { exec unshare --net --mount --uts bash -euo pipefail -c 'echo; read -r; settle 1; echo; work 1 "$@"' node "$@"; }
node_1=$other_PID
read -r <&"${other[0]}" # it has namespaces of its own now
ip link add wire type veth peer name wire netns "$node_1"
settle 0
echo >&"${other[1]}"
read -r <&"${other[0]}" # both ends of the wire are up
code=0
work 0 "$@" || code=$?
wait "$node_1" || code=$?
exit "$code"
