#!/usr/bin/env bash
# A machine's life on StratoVirt's command line and QMP: boot, a hot-plugged disk, a snapshot, a clone that goes on from it.
# docs/tour.md tells it step by step.
#
#   docs/tour.sh
#
# Needs /dev/kvm, socat, and what `make build guest` has made. To try another build, or StratoVirt itself as far as it goes:
#   STRATOVIRT=/usr/bin/stratovirt KERNEL=vmlinux INITRD=initrd docs/tour.sh
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stratovirt=${STRATOVIRT:-"$checkout/target/release/inlay vm"}
kernel=${KERNEL:-$checkout/target/guest/vmlinux}
initrd=${INITRD:-$checkout/target/guest/inlay-tools.initrd}

work=$(mktemp -d)
cd "$work"
end() {
    cat ./*.pid 2>/dev/null | xargs --no-run-if-empty kill 2>/dev/null || true
    rm -rf "$work"
}
trap end EXIT

say() { printf '\n== %s\n' "$*"; }

# machine NAME OPTIONS...: starts a machine in the background, with the console on a pseudo-terminal that the variable
# console_NAME is a descriptor of.
machine() {
    local name=$1 said terminal
    shift
    # shellcheck disable=SC2086 # `inlay vm` is two words.
    said=$($stratovirt -name "$name" -machine microvm -smp 1 -m 128 -kernel "$kernel" -initrd "$initrd" \
        -append "console=ttyS0 reboot=k panic=-1 quiet" -serial pty -qmp "unix:$name.qmp,server,nowait" \
        -daemonize -pidfile "$name.pid" "$@")
    terminal=${said##*char device redirected to }
    exec {fd}<>"$terminal"
    declare -g "console_$name=$fd"
}

# qmp NAME COMMAND [ARGUMENTS]: executes a QMP command and prints what the machine answers, but for its greeting.
qmp() {
    local request="{\"execute\": \"$2\", \"arguments\": ${3:-{\}}}" answer
    printf 'qmp %s: %s\n' "$1" "$request"
    answer=$(socat -t 60 - "UNIX-CONNECT:$1.qmp" <<<"$request" | tr -d '\r' | sed 1d)
    printf '%s\n' "$answer"
    [[ $answer != *'"error"'* ]]
}

# guest NAME COMMAND: runs a shell command in the guest, and prints what it says. The guest's end is guest/tools/init.
guest() {
    local console=console_$1 line=
    printf '%s# %s\n' "$1" "$2"
    printf '1 %s\n' "$(base64 --wrap=0 <<<"$2")" >&"${!console}"
    until [[ $line == *"<1 "*">"* ]]; do read -r -t 60 line <&"${!console}"; done
    line=${line#*<1 }
    line=${line%>*}
    base64 --decode <<<"${line#* }"
    return "${line%% *}"
}

say "1. Boot"
machine first
until [[ ${line:-} == *"<0 0 >"* ]]; do read -r -t 60 line <&"$console_first"; done
qmp first query-status
guest first "uname -r; cat /proc/loadavg"

say "2. Plug a disk while it runs"
truncate --size 32M disk
qmp first blockdev-add '{"node-name": "data", "driver": "raw", "file": {"driver": "file", "filename": "disk"}}'
qmp first device_add '{"id": "data", "driver": "virtio-blk-mmio", "drive": "data", "addr": "0x0"}'
guest first "until [ \$(cat /sys/block/vda/size) = 65536 ]; do sleep 0.1; done; mke2fs /dev/vda >/dev/null && mkdir /data && mount /dev/vda /data"
guest first "echo 'written before the snapshot' >/data/note && sync; (while sleep 1; do echo tick; done >/tmp/ticks) & echo counting"

say "3. Save it: the machine stops, and is in a directory"
qmp first migrate '{"uri": "file:snapshot"}'
qmp first query-migrate
ls -sh snapshot
# What the guest has of the disk in its memory fits only the disk as it is now: both are saved together.
cp --sparse=always disk disk.clone

say "4. A clone goes on from there, with a disk of its own"
machine clone -incoming file:snapshot \
    -drive id=data,file=disk.clone,direct=off -device virtio-blk-device,id=data,drive=data
guest clone "cat /data/note; echo 'written by the clone' >>/data/note; sync; cat /data/note"
guest clone "before=\$(wc -l </tmp/ticks); until [ \$(wc -l </tmp/ticks) -gt \$before ]; do sleep 0.1; done; echo 'The clone counts on.'"

say "5. The first one goes on too, and knows nothing of the clone"
qmp first cont
guest first "cat /data/note; umount /data"
qmp first device_del '{"id": "data"}'
qmp first quit
qmp clone quit

say "The tour is over"
