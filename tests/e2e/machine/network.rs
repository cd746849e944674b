//! Interfaces and sockets between a guest and the host.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use inlay_tests::harness::standalone::{Rig, Vm, host, noise, vsock};
use serde_json::Value;

crate::on_a_rig!(
    carry_frames_both_ways,
    carry_frames_both_ways_by_the_kernel,
    reach_sockets_of_the_host,
    balance_by_a_virtual_server,
);

/// Bytes of a file that is carried and compared.
const AMOUNT: usize = 4 << 20;

/// The guest's hardware address.
const MAC: &str = "02:00:00:00:00:07";

/// The guest's name of the interface with the address [`MAC`]. There are others, which nothing is plugged into.
fn interface(vm: &Vm) -> String {
    vm.sh(&format!("grep -l {MAC} /sys/class/net/*/address | cut -d / -f 5")).trim().to_owned()
}

/// Gives both ends of an interface their addresses: the host's is 10.77.0.1, the guest's 10.77.0.2.
fn address(vm: &Vm, tap: &str) {
    host(&["ip", "address", "add", "10.77.0.1/24", "dev", tap]);
    host(&["ip", "link", "set", tap, "up"]);
    let interface = interface(vm);
    vm.sh(&format!("ip address add 10.77.0.2/24 dev {interface} && ip link set {interface} up"));
}

/// Bits of a second that iperf3 carries, to the guest and from it, at once.
fn throughput() -> (f64, f64) {
    let report = iperf(&["--bidir", "--time", "3", "--parallel", "2", "--json"]);
    let report: Value = serde_json::from_str(&report).unwrap();
    let rate = |sum: &str| report["end"][sum]["bits_per_second"].as_f64().unwrap_or_else(|| panic!("{report}"));
    (rate("sum_received"), rate("sum_received_bidir_reverse"))
}

fn iperf(args: &[&str]) -> String {
    let output =
        Command::new("iperf3").args(["--client", "10.77.0.2"]).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Connects to a guest that may not listen yet.
pub fn connect(address: &str) -> TcpStream {
    let started = Instant::now();
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(error) => assert!(started.elapsed() < Duration::from_secs(60), "{address}: {error}"),
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A file goes to the guest and another one comes back, over TCP, and neither has changed.
fn files_go_both_ways(vm: &Vm) {
    let sent = noise(AMOUNT);
    let listener = vm.spawn("nc -l -p 9 >/tmp/file");
    let mut stream = connect("10.77.0.2:9");
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    vm.join(listener);
    drop(stream);
    let server = vm.spawn("nc -l -p 9 </tmp/file");
    let mut back = Vec::new();
    connect("10.77.0.2:9").read_to_end(&mut back).unwrap();
    vm.join(server);
    assert!(back == sent, "{} bytes came back, and they are not those that were sent", back.len());
}

fn exercise(vm: &Vm, tap: &str) {
    address(vm, tap);
    vm.sh("iperf3 --server --daemon");
    vm.sh("ping -c 1 -W 10 10.77.0.1");
    files_go_both_ways(vm);
    let (to, from) = throughput();
    println!("{tap}: {:.0} Mbit/s to the guest and {:.0} from it at once", to / 1e6, from / 1e6);
    assert!(to > 0.0 && from > 0.0);
    let errors = vm.sh(&format!("cat /sys/class/net/{}/statistics/[rt]x_errors", interface(vm)));
    assert_eq!(errors.split_whitespace().collect::<Vec<_>>(), ["0", "0"]);
}

/// Two pairs of queues and two processors.
fn carry_frames_both_ways(rig: &Rig) {
    let vm = rig
        .vm()
        .cpus(2)
        .option("-netdev", "tap,id=n,ifname=inlay0,queues=2")
        .option("-device", format!("virtio-net-device,id=n,netdev=n,mac={MAC},mq=on"))
        .boot();
    assert_eq!(vm.sh("ls -d /sys/class/net/eth0/queues/rx-* | wc -l").trim(), "2");
    assert_eq!(interface(&vm), "eth0");
    exercise(&vm, "inlay0");
    assert!(vm.quit().success());
}

/// vhost-net: no frame passes through the machine's process.
fn carry_frames_both_ways_by_the_kernel(rig: &Rig) {
    let vm = rig
        .vm()
        .cpus(2)
        .option("-netdev", "tap,id=n,ifname=inlay0,queues=2,vhost=on")
        .option("-device", format!("virtio-net-device,id=n,netdev=n,mac={MAC},mq=on"))
        .boot();
    exercise(&vm, "inlay0");
    let name = format!("vhost-{}", vm.pid());
    let threads = fs::read_dir("/proc").unwrap().flatten();
    let comms = threads.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    assert!(comms.into_iter().any(|comm| comm.trim() == name), "The kernel has no thread {name}");
    // A driver that goes and comes again gets its frames.
    let device = vm.sh(&format!("basename $(readlink -f /sys/class/net/{}/device)", interface(&vm)));
    let device = device.trim();
    vm.sh(&format!("cd /sys/bus/virtio/drivers/virtio_net && echo {device} >unbind && echo {device} >bind"));
    let interface = interface(&vm);
    vm.sh(&format!(
        "ip address add 10.77.0.2/24 dev {interface} && ip link set {interface} up && ping -c 1 -W 10 10.77.0.1"
    ));
    files_go_both_ways(&vm);
    assert!(vm.quit().success());
}

/// vhost-vsock, in both directions.
fn reach_sockets_of_the_host(rig: &Rig) {
    const CID: u32 = 77;
    let vm = rig.vm().option("-device", format!("vhost-vsock-device,id=v,guest-cid={CID}")).boot();
    let sent = noise(AMOUNT);

    let echo = vm.spawn("socat VSOCK-LISTEN:1234 OPEN:/tmp/file,creat,trunc");
    let mut stream = vsock::connect(CID, 1234, Duration::from_secs(30));
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    vm.join(echo);
    drop(stream);

    let listener = vsock::Listener::bind(1235);
    let client = vm.spawn("socat -u OPEN:/tmp/file VSOCK-CONNECT:2:1235");
    let mut back = Vec::new();
    listener.accept().read_to_end(&mut back).unwrap();
    vm.join(client);
    assert!(back == sent, "{} bytes came back, and they are not those that were sent", back.len());
    // Nobody listens there.
    assert_ne!(vm.try_sh("socat -u OPEN:/dev/null VSOCK-CONNECT:2:1236").code, 0);
    assert!(vm.quit().success());
}

/// The guest's kernel has a patch by which IPVS does nothing, its estimator of rates least of all, until there is a service.
fn balance_by_a_virtual_server(rig: &Rig) {
    let vm = rig.vm().boot();
    vm.sh("ip address add 10.79.0.1/32 dev lo; ipvsadm -A -t 10.79.0.1:80 -s rr && ipvsadm -a -t 10.79.0.1:80 -r 127.0.0.1:8080 -m");
    vm.sh("socat TCP-LISTEN:8080,fork,reuseaddr EXEC:'echo balanced' >/dev/null 2>&1 </dev/null &");
    let reach = "socat -u TCP:10.79.0.1:80,retry=20,interval=0.5 -";
    assert_eq!(vm.sh(reach), "balanced\n");
    // The fourth column is the packets of each second, which the estimator finds out.
    let estimated = "ipvsadm -Ln --rate | awk '$1 == \"TCP\" && $4 > 0 { found = 1 } END { exit !found }'";
    vm.sh(&format!("i=0; until {estimated}; do i=$((i + 1)); [ $i -lt 60 ] && {reach} >/dev/null || exit 1; done"));
    println!("{}", vm.sh("ipvsadm -Ln --rate"));
    vm.quit();
}
