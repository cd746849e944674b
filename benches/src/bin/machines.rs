//! What the devices of a machine do for a Linux guest: `inlay vm`, and the StratoVirt that `STRATOVIRT` names, with the same
//! command line in the host that this runs in. Prints Markdown tables.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use benches::table::markdown;
use inlay_tests::harness::standalone::{Order, Rig, host};
use inlay_tests::harness::{Pss, statistic};
use serde_json::Value;

/// Bytes of each disk, file and stream.
const AMOUNT: u64 = 32 << 20;

/// How long each load on a drive lasts, in seconds.
const SECONDS: u32 = 4;

/// Files of the small-files load on a directory.
const FILES: u32 = 300;

/// Of the guest's interface.
const MAC: &str = "52:54:00:4e:00:01";

/// Figures of one monitor: what was measured, and how much of it.
type Figures = BTreeMap<(usize, String), f64>;

fn main() -> Result<()> {
    let rig = Rig::new();
    let mut monitors = vec![("Inlay", rig.parts().shim.clone())];
    if let Some(path) = std::env::var_os("STRATOVIRT").filter(|path| !path.is_empty()) {
        monitors.push(("StratoVirt", PathBuf::from(path)));
    }
    let mut columns = Vec::new();
    for (name, program) in &monitors {
        eprintln!("Measuring the devices of {name}");
        columns.push((*name, measure(&rig, program)?));
    }
    println!("{}", table(&columns));
    println!("### A directory, served in the process and by Debian's virtiofsd\n");
    println!("{}", directories(&rig)?);
    Ok(())
}

fn measure(rig: &Rig, program: &Path) -> Result<Figures> {
    let mut figures = Figures::new();
    let mut note = |what: String, figure: f64| {
        let place = figures.len();
        figures.insert((place, what), figure);
    };
    boot(&rig.vm().program(program), &mut note)?;
    let scratch = rig.scratch(128);
    for (engine, options) in [("threads", "direct=off,aio=threads"), ("io_uring, direct", "direct=on,aio=io_uring")] {
        drive(rig, program, &scratch, engine, options, &mut note);
    }
    for (kind, options) in [("tap", ""), ("tap, vhost-net", ",vhost=on")] {
        interface(rig, program, kind, options, &mut note)?;
    }
    socket(rig, program, &mut note)?;
    Ok(figures)
}

/// From the program's start to the guest's shell, and what that took of exits and memory.
fn boot(order: &Order, note: &mut impl FnMut(String, f64)) -> Result<()> {
    let vm = order.clone().boot();
    note("exec to the guest's shell, ms".into(), vm.started().elapsed().as_secs_f64() * 1e3);
    for kind in ["exits", "io_exits", "mmio_exits", "halt_exits"] {
        note(format!("{kind} until then"), statistic(vm.pid(), kind)? as f64);
    }
    let pss = Pss::of_monitor(vm.pid(), 128 << 10)?;
    note("PSS without guest memory, KiB".into(), pss.own as f64);
    vm.quit();
    Ok(())
}

fn drive(rig: &Rig, program: &Path, scratch: &Path, engine: &str, options: &str, note: &mut impl FnMut(String, f64)) {
    let file = rig.file_in(scratch, "disk", AMOUNT);
    let vm = rig
        .vm()
        .program(program)
        .option("-drive", format!("id=d,file={},{options}", file.display()))
        .option("-device", "virtio-blk-device,id=d,drive=d")
        .boot();
    // First written, so that nothing is measured on holes.
    vm.sh(&format!("dd if=/dev/zero of=/dev/vda bs=1M oflag=direct count={}", AMOUNT >> 20));
    for (pattern, block, unit, field) in [
        ("randread", "4k", "4 KiB random reads, IOPS", 7),
        ("randwrite", "4k", "4 KiB random writes, IOPS", 48),
        ("read", "128k", "128 KiB reads in order, KiB/s", 6),
        ("write", "128k", "128 KiB writes in order, KiB/s", 47),
    ] {
        let said = vm.sh(&format!(
            "fio --name=b --thread --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=8 --rw={pattern} \
             --bs={block} --size={AMOUNT} --time_based --runtime={SECONDS} --minimal"
        ));
        // fio's terse output, version 3: fields between semicolons.
        let fields = said.lines().find(|line| line.starts_with("3;")).unwrap_or_default().split(';');
        let figure = fields.into_iter().nth(field).and_then(|field| field.parse().ok()).unwrap_or(f64::NAN);
        note(format!("drive ({engine}): {unit}"), figure);
    }
    vm.quit();
    // The name is the next drive's.
    let _ = fs::remove_file(file);
}

fn interface(rig: &Rig, program: &Path, kind: &str, options: &str, note: &mut impl FnMut(String, f64)) -> Result<()> {
    let vm = rig
        .vm()
        .program(program)
        .option("-netdev", format!("tap,id=n,ifname=bench0{options}"))
        .option("-device", format!("virtio-net-device,id=n,netdev=n,mac={MAC}"))
        .boot();
    host(&["ip", "address", "add", "10.78.0.1/24", "dev", "bench0"]);
    host(&["ip", "link", "set", "bench0", "up"]);
    // Monitors differ in how many interfaces the guest sees before it.
    vm.sh(&format!(
        "name=$(basename $(dirname $(grep -l {MAC} /sys/class/net/*/address))) && \
         ip address add 10.78.0.2/24 dev $name && ip link set $name up && iperf3 --server --daemon"
    ));
    vm.sh("ping -c 1 -W 10 10.78.0.1");
    for (direction, words) in [("to the guest", &[][..]), ("from the guest", &["--reverse"][..])] {
        let mut client = Command::new("iperf3");
        client.args(["--client", "10.78.0.2", "--time", "4", "--json"]).args(words).stdin(Stdio::null());
        let report: Value = serde_json::from_slice(&client.output().context("iperf3 cannot be run")?.stdout)?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or(f64::NAN);
        note(format!("interface ({kind}): TCP {direction}, Mbit/s"), rate / 1e6);
    }
    let ping = vm.sh("ping -c 50 -i 0.02 -q 10.78.0.1");
    // busybox: round-trip min/avg/max = 0.1/0.2/0.3 ms
    let average = ping.split('/').nth(3).and_then(|field| field.trim().parse().ok()).unwrap_or(f64::NAN);
    note(format!("interface ({kind}): round trip, ms"), average);
    vm.quit();
    Ok(())
}

/// The host's vhost-vsock, through which StratoVirt's machines talk as well.
fn socket(rig: &Rig, program: &Path, note: &mut impl FnMut(String, f64)) -> Result<()> {
    let vm = rig.vm().program(program).option("-device", "vhost-vsock-device,id=v,guest-cid=79").boot();
    let sink = vm.spawn("socat -u VSOCK-LISTEN:1234 OPEN:/dev/null");
    let mut stream = inlay_tests::harness::standalone::vsock::connect(79, 1234, Duration::from_secs(30));
    let started = Instant::now();
    let piece = vec![0x5a; 64 << 10];
    for _ in 0..AMOUNT / piece.len() as u64 {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // Closed by the guest when it has read everything.
    stream.read_to_end(&mut Vec::new())?;
    note("vsock: to the guest, KiB/s".into(), AMOUNT as f64 / 1024.0 / started.elapsed().as_secs_f64());
    vm.join(sink);
    vm.quit();
    Ok(())
}

/// The same loads on the same machine's two directories.
fn directories(rig: &Rig) -> Result<String> {
    let [own, remote] = ["own", "remote"].map(|name| rig.path(name));
    fs::create_dir(&own)?;
    fs::create_dir(&remote)?;
    let socket = rig.path("virtiofsd");
    let _daemon = Daemon::start(&socket, &remote)?;
    let vm = rig
        .vm()
        .cpus(2)
        .shared()
        .option("-device", format!("virtio-fs-device,id=own,source={},tag=own", own.display()))
        .option("-chardev", format!("socket,id=remote,path={}", socket.display()))
        .option("-device", "vhost-user-fs-device,id=remote,chardev=remote,tag=remote")
        .boot();
    let files = format!("for i in $(seq {FILES}); do echo $i >f$i; done; cat f* >/dev/null; rm f*");
    let loads = [
        ("make, read and remove small files, files/s", f64::from(FILES), files),
        (
            "write a stream, KiB/s",
            AMOUNT as f64 / 1024.0,
            format!("dd if=/dev/zero of=s bs=1M count={} conv=fsync", AMOUNT >> 20),
        ),
        ("read a stream, KiB/s", AMOUNT as f64 / 1024.0, "dd if=s of=/dev/null bs=1M".to_owned()),
    ];
    let head = ["", "in the process", "virtiofsd", "ratio"].map(String::from).to_vec();
    let mut rows = vec![head];
    vm.sh("for tag in own remote; do mkdir -p /mnt/$tag && mount -t virtiofs $tag /mnt/$tag; done");
    for (what, amount, load) in loads {
        let rate = |tag: &str| {
            vm.sh("sync; echo 3 >/proc/sys/vm/drop_caches");
            let started = Instant::now();
            vm.sh(&format!("cd /mnt/{tag} && ({load}) 2>/dev/null"));
            amount / started.elapsed().as_secs_f64()
        };
        // In turns, and the better of two: the first may have to make what the second finds.
        let rates = [rate("own"), rate("remote"), rate("own"), rate("remote")];
        let (own, remote) = (rates[0].max(rates[2]), rates[1].max(rates[3]));
        rows.push(vec![what.to_owned(), number(own), number(remote), format!("{:.2}", own / remote)]);
    }
    vm.quit();
    Ok(markdown(&rows))
}

/// virtiofsd, ended with this value.
struct Daemon(Child);

impl Daemon {
    fn start(socket: &Path, source: &Path) -> Result<Self> {
        let mut command = Command::new("/usr/lib/qemu/virtiofsd");
        command
            .arg(format!("--socket-path={}", socket.display()))
            .args(["-o", &format!("source={}", source.display())]);
        command.args(["-o", "sandbox=chroot", "-o", "log_level=err", "-o", "cache=auto", "--rlimit-nofile=1024"]);
        let daemon = Self(command.stdin(Stdio::null()).spawn().context("virtiofsd cannot be run")?);
        let started = Instant::now();
        while !socket.exists() {
            anyhow::ensure!(started.elapsed() < Duration::from_secs(30), "virtiofsd makes no socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It ends by itself with the machine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn table(columns: &[(&str, Figures)]) -> String {
    let mut head = vec![String::new()];
    head.extend(columns.iter().map(|(name, _)| (*name).to_owned()));
    let mut rows = vec![head];
    let Some((_, first)) = columns.first() else { return String::new() };
    for (key, figure) in first {
        let mut row = vec![key.1.clone(), number(*figure)];
        row.extend(columns.iter().skip(1).map(|(_, figures)| match figures.get(key) {
            Some(other) => format!("{} ({:.2} of it)", number(*other), figure / other),
            None => String::new(),
        }));
        rows.push(row);
    }
    markdown(&rows)
}

fn number(figure: f64) -> String {
    if figure < 10.0 { format!("{figure:.2}") } else { format!("{figure:.0}") }
}
