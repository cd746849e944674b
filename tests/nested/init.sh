#!/bin/busybox sh
# PID 1 of the nested host's initrd. The kernel's command line names the program to go on with:
# inlay.inside=PATH, a path on the machine whose root is shared with us.
set -e
busybox=/bin/busybox
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sysfs /sys
$busybox mount -t devtmpfs devtmpfs /dev

# MODULE.PARAMETER=VALUE on the command line is for insmod to pass on.
while read -r module; do
    options=
    for word in $($busybox cat /proc/cmdline); do
        case $word in "$module".*) options="$options ${word#"$module".}" ;; esac
    done
    # shellcheck disable=SC2086
    $busybox insmod "/modules/$module.ko" $options
done < /modules/order

# The machine's root is below, and everything written goes to memory: nothing done here can hurt it.
$busybox mount -t virtiofs -o ro root /lower
$busybox mount -t tmpfs -o size=75% tmpfs /upper
$busybox mkdir /upper/data /upper/work
$busybox mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work overlay /root

for dir in proc sys dev; do
    $busybox mount --move "/$dir" "/root/$dir"
done
for word in $($busybox cat /root/proc/cmdline); do
    case $word in inlay.inside=*) inside=${word#inlay.inside=} ;; esac
done
exec $busybox switch_root /root "$inside" inside
