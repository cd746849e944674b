//! What a container does with the files of its root file system.

use inlay_tests::harness::Scene;
use inlay_tests::images;

crate::for_both_runtimes!(changes_files_in_every_way);

/// Makes, links, renames, changes and removes files, and says what became of them.
const CHANGES: &str = r"
    set -e
    mkdir -p /d/e && cd /d
    echo one > f
    printf 'two\n' >> f
    ln f hard && ln -s f soft && mkfifo fifo
    mv f e/moved && ln -sf e/moved soft
    chmod 640 e/moved && chown 12:34 e/moved && touch -d '2001-02-03 04:05:06' e/moved
    stat -c '%A %h %u:%g %s %Y' e/moved
    stat -c '%A %F' fifo
    readlink soft
    cat soft
    dd if=/dev/zero of=big bs=64k count=4 seek=2 conv=fsync 2>/dev/null
    truncate -s 300000 big
    fallocate -o 0 -l 500000 big
    sync -d big
    stat -c %s big
    md5sum < big
    cp -a e copy && ls copy
    stat -f -c %l . > /dev/null
    mv big e && mv -f e/big copy/moved
    rm -r e && cat hard && stat -c %h hard
    test ! -e soft && test -L soft
    rmdir copy 2>/dev/null || echo kept
    rm -rf /d && test ! -e /d && echo gone";

const BECAME: &str = "-rw-r----- 2 12:34 8 981173106
prw-r--r-- fifo
e/moved
one
two
500000
665fdfff72e08d31c2444ad00a0040e9  -
moved
one
two
1
kept
gone
";

fn changes_files_in_every_way(scene: &Scene) {
    let output = scene.run_with(&[], images::BUSYBOX, &["sh", "-c", CHANGES]).ok();
    assert_eq!(output.stdout, BECAME, "{}", output.stderr);
}
