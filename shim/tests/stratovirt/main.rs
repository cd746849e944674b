//! The real binary, called `stratovirt`, with guests of a few bytes on this machine's KVM.

mod host;
mod operator;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use host::{Guest, Host, PANICKED, SHUTDOWN, eventually, kvm, stratovirt, text};
use vmm::stratovirt::{CommandLine, Launch, Request};

#[test]
fn a_shutdown_is_success_and_a_panic_failure() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().print("hello").end(SHUTDOWN));
    let output = host.run(&["-serial", "stdio"]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{output:?}");
    assert_eq!(text(&output.stderr), "");

    let host = Host::new(&Guest::default().print("Kernel panic - not syncing: no luck\r\n").end(PANICKED));
    let output = host.run(&[]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
    assert_eq!(text(&output.stderr), "The guest's kernel has panicked: no luck\n");
}

#[test]
fn inlay_vm_is_the_same_program() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().print("hello").end(SHUTDOWN));
    let words = ["vm", "-kernel", "kernel", "-m", "128", "-serial", "stdio"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_inlay"));
    let output = command.current_dir(host.root.path()).args(words).stdin(Stdio::null()).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "hello".into()), "{output:?}");
}

#[test]
fn more_input_than_the_port_holds_reaches_the_guest_in_order() {
    if !kvm() {
        return;
    }
    let input: Vec<u8> = (0..200_u8).map(|index| b'!' + index % 90).collect();
    let guest = input.iter().fold(Guest::default(), |guest, _| guest.echo()).end(SHUTDOWN);
    let host = Host::new(&guest);
    let mut child = host.command(&["-serial", "stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), text(&input));
    assert!(output.status.success());
}

#[test]
fn the_console_goes_to_a_file() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().print("hello").end(SHUTDOWN));
    for words in [["-serial", "file,path=out"].as_slice(), &["-chardev", "file,id=c,path=out", "-serial", "chardev:c"]]
    {
        let output = host.run(words);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read_to_string(host.path("out")).unwrap(), "hello");
        fs::remove_file(host.path("out")).unwrap();
    }
}

#[test]
fn the_console_is_a_socket_that_is_gone_with_the_machine() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().echo().echo().end(SHUTDOWN));
    // What a process left that was killed.
    drop(std::os::unix::net::UnixListener::bind(host.path("console")).unwrap());
    let mut child = host.command(&["-serial", "socket,path=console,server,nowait"]).spawn().unwrap();
    let mut client = eventually("the socket", || UnixStream::connect(host.path("console")).ok());
    client.write_all(b"ok").unwrap();
    let mut said = [0; 2];
    client.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"ok");
    assert!(child.wait().unwrap().success());
    assert!(!host.path("console").exists());
}

#[test]
fn the_console_is_a_pseudo_terminal_whose_name_is_told() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().echo().echo().end(SHUTDOWN));
    let mut child = host.command(&["-serial", "pty"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    let name = line.trim().strip_prefix("char device redirected to ").expect(&line);
    let mut terminal = fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
    terminal.write_all(b"ok").unwrap();
    let mut said = [0; 2];
    terminal.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"ok");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_frozen_machine_does_not_run() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().print("hello").end(SHUTDOWN));
    let mut child = host.command(&["-S", "-serial", "file,path=out"]).spawn().unwrap();
    let threads = || fs::read_dir(format!("/proc/{}/task", child.id())).map_or(0, Iterator::count);
    // The processor's thread is there, and waits.
    eventually("the processor", || (threads() >= 2).then_some(()));
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(child.try_wait().unwrap(), None);
    assert_eq!(fs::read_to_string(host.path("out")).unwrap(), "");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn threads_are_under_filters_unless_asked_not_to_be() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().echo().end(SHUTDOWN));
    for (words, mode, warned) in [(&[][..], "2", false), (&["-disable-seccomp"], "0", true)] {
        let log = if warned { "unconfined" } else { "confined" };
        let words = [&["-D", log, "-S", "-serial", "socket,path=console,server,nowait"], words].concat();
        let mut child = host.command(&words).spawn().unwrap();
        let processor = || {
            let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).ok()?;
            let statuses = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
            statuses.into_iter().find(|status| status.starts_with("Name:\tvcpu"))
        };
        let field =
            |status: &str, name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
        let modes = || field(&processor()?, "Seccomp:\t");
        eventually("the processor under its filter", || (modes()? == mode).then_some(()));
        // The process as a whole: what it starts with is what its first thread has.
        let main = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        assert_eq!(field(&main, "Seccomp:\t").as_deref(), Some(mode), "{main}");
        let confined = mode == "2";
        assert_eq!(field(&main, "NoNewPrivs:\t").as_deref(), Some(if confined { "1" } else { "0" }));
        let capabilities = u64::from_str_radix(&field(&main, "CapEff:\t").unwrap(), 16).unwrap();
        // CAP_SYS_ADMIN and CAP_NET_ADMIN.
        assert!(!confined || capabilities & (1 << 21 | 1 << 12) == 0, "{capabilities:#x}");
        let warns = || fs::read_to_string(host.path(log)).is_ok_and(|said| said.contains("WARN"));
        if warned {
            eventually("the warning", || warns().then_some(()));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(warns(), warned);
    }
}

#[test]
fn without_confinement_that_is_said_with_or_without_a_log() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().end(SHUTDOWN));
    for words in [&["-disable-seccomp"][..], &["-disable-seccomp", "-D"], &["-disable-seccomp", "-D", "log"]] {
        let output = host.run(words);
        assert!(text(&output.stderr).contains("SECCOMP IS DISABLED"), "{words:?}: {output:?}");
    }
    assert!(fs::read_to_string(host.path("log")).unwrap().contains("SECCOMP IS DISABLED"));
}

#[test]
fn a_machine_goes_on_from_a_snapshot() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().print("up\n").echo().end(SHUTDOWN));
    let [kernel, out, snapshot] = ["kernel", "out", "snapshot"].map(|name| host.path(name).display().to_string());
    let words = ["-kernel", &kernel, "-m", "128", "-serial", &format!("file,path={out}")].map(Into::into);
    let Ok(Request::Run(line)) = CommandLine::parse(words) else { panic!("a command line") };
    let machine = vmm::Machine::build(Launch::open(*line).unwrap().machine).unwrap();
    machine.start().unwrap();
    eventually("the guest", || fs::read_to_string(&out).is_ok_and(|said| said == "up\n").then_some(()));
    machine.snapshot(Path::new(&snapshot)).unwrap();
    machine.stop();

    let incoming = format!("file:{snapshot}");
    let words = ["-serial", "stdio", "-incoming", &incoming];
    let mut child = host.command(&words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"x").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), "x".into()), "{output:?}");

    let output = host.run(&["-smp", "2", "-incoming", &incoming]);
    assert!(text(&output.stderr).starts_with("The snapshot has 1 vCPUs, the machine's configuration 2"), "{output:?}");
    let output = host.run(&["-incoming", "unix:/s"]);
    assert!(text(&output.stderr).contains("a snapshot is a directory: file:DIR"), "{output:?}");
}

#[test]
fn a_daemon_returns_when_the_machine_is_built_and_leaves_its_id() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().echo().end(SHUTDOWN));
    let words = ["-daemonize", "-pidfile", "pid", "-serial", "socket,path=console,server,nowait"];
    // Were a descriptor left open, the end of the output would not come.
    let output = host.run(&words);
    assert!(output.status.success(), "{output:?}");
    let pid: u32 = fs::read_to_string(host.path("pid")).unwrap().trim().parse().unwrap();
    let running = || Path::new(&format!("/proc/{pid}/task")).exists();
    assert!(running());
    UnixStream::connect(host.path("console")).unwrap().write_all(b"x").unwrap();
    eventually("the daemon's end", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    });
}

#[test]
fn a_daemon_that_cannot_be_says_why() {
    let host = Host::new(&Guest::default());
    let output = host.run(&[
        "-daemonize",
        "-initrd",
        "nothing",
        "-drive",
        "id=d,file=nothing",
        "-device",
        "virtio-blk-device,drive=d,id=d",
    ]);
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(1), "Cannot open nothing: No such file or directory (os error 2)\n".into())
    );
    let output = host.run(&["-daemonize", "-serial", "stdio"]);
    assert!(text(&output.stderr).contains("a daemon has no terminal"), "{output:?}");
    // A terminal that a session's leader opens becomes the session's, whose end then kills it.
    let output = host.run(&["-daemonize", "-serial", "pty", "-incoming", "file:/nothing"]);
    assert!(text(&output.stderr).starts_with("There is no snapshot that can be restored"), "{output:?}");
}

#[test]
fn refusals_are_one_line_and_status_1() {
    let host = Host::new(&Guest::default());
    for (words, sentence) in [
        (&["-frob"][..], "There is no option -frob"),
        (&["--machine", "microvm"], "options have one dash"),
        (&["-serial", "socket,path=s,server"], "the properties server and nowait are needed"),
        (&["-device", "virtio-blk-device,id=a,drive=b"], "Device a needs a -drive with the id b"),
        (&["-device", "virtio-net-device,id=a,netdev=b"], "Device a needs a -netdev with the id b"),
        (
            &["-netdev", "tap,id=n,fd=99", "-device", "virtio-net-device,id=n,netdev=n"],
            "it was not left open for this program",
        ),
        (&["-netdev", "tap,id=n", "-device", "virtio-net-device,id=n,netdev=n"], "it has neither ifname nor fd"),
        (&["-drive", "id=d,file=kernel,aio=off", "-device", "virtio-blk-device,id=d,drive=d"], "there is no aio=off"),
        (
            &["-drive", "id=d,file=kernel,direct=off,aio=native", "-device", "virtio-blk-device,id=d,drive=d"],
            "needs direct=on",
        ),
        (&["-chardev", "pty,id=c", "-chardev", "stdio,id=c"], "There are two of -chardev with the id c"),
        (
            &["-chardev", "stdio,id=c", "-device", "virtconsole,id=p,chardev=c"],
            "Device p needs a -device virtio-serial-device",
        ),
        (&["-smp", "4,cores=3"], "do not make its processors"),
        (&["-object", "memory-backend-ram,id=m,size=64M", "-numa", "node,memdev=m"], "its size is not that of -m"),
        (
            &["-chardev", "socket,id=f,path=s", "-device", "vhost-user-fs-device,id=f,chardev=f,tag=t"],
            "it needs -machine mem-share=on",
        ),
        (
            &["-device", "vhost-vsock-device,id=v,guest-cid=3,vhostfd=99"],
            "Descriptor 99 of device v cannot be: it was not left open for this program",
        ),
        (
            &["-netdev", "tap,id=n,ifname=t,queues=17", "-device", "virtio-net-device,id=n,netdev=n,mq=on"],
            "it has 1 to 16 pairs of queues",
        ),
        (
            &["-netdev", "tap,id=n,fds=98:99,queues=3", "-device", "virtio-net-device,id=n,netdev=n,mq=on"],
            "it has another number of queues than of descriptors",
        ),
    ] {
        let output = host.run(words);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        assert!(said.contains(sentence) && said.lines().count() == 1, "{words:?}: {said}");
    }
}

#[test]
fn help_and_version_need_no_machine() {
    for word in ["-help", "-version"] {
        let output = stratovirt().arg(word).output().unwrap();
        assert!(output.status.success() && !output.stdout.is_empty(), "{output:?}");
    }
}

/// A program that may make interfaces makes one with two queues for the machine.
#[test]
fn an_interface_has_pairs_of_queues_and_leaves_its_frames_to_the_kernel() {
    let host = Host::new(&Guest::default().end(SHUTDOWN));
    let interface = |properties: &str| {
        let netdev = format!("tap,id=n,ifname=strato%d{properties}");
        host.run(&["-netdev", &netdev, "-device", "virtio-net-device,id=n,netdev=n,mq=on"])
    };
    let output = interface(",queues=2");
    if text(&output.stderr).starts_with("Interface n cannot be used") || !kvm() {
        println!("skipped: this host has no interfaces for tests");
        return;
    }
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    let refused = |properties: &str| text(&interface(properties).stderr);
    assert!(refused(",queues=2,vhost=on,vhostfd=99").contains("takes a descriptor of /dev/vhost-net"));
    assert!(refused(",vhostfd=99").contains("without vhost=on"));
    if !Path::new("/dev/vhost-net").exists() {
        let said = refused(",vhost=on");
        assert!(
            said.starts_with("The host's kernel cannot serve interface n: This host has no /dev/vhost-net"),
            "{said}"
        );
    }
}

#[test]
fn devices_and_memory_of_every_kind_make_a_machine() {
    if !kvm() {
        return;
    }
    let host = Host::new(&Guest::default().end(SHUTDOWN));
    fs::write(host.path("disk"), [0; 4096]).unwrap();
    let devices = [
        "-drive",
        "id=d,file=disk,readonly=on,direct=off",
        "-device",
        "virtio-blk-device,drive=d,id=d,serial=s",
        "-drive",
        "id=q,file=disk,readonly=on,direct=off,aio=threads,throttling.iops-total=100",
        "-device",
        "virtio-blk-device,drive=q,id=q,num-queues=4,queue-size=512",
        "-object",
        "rng-random,id=r,filename=/dev/urandom",
        "-device",
        "virtio-rng-device,rng=r,id=rng0",
        "-device",
        "virtio-balloon-device,id=b,deflate-on-oom=on",
        "-device",
        "virtio-serial-device,id=vs",
        "-chardev",
        "socket,id=c,path=hvc,server,nowait",
        "-device",
        "virtconsole,chardev=c,id=vc,nr=0",
        "-device",
        "virtio-fs-device,id=f,tag=t,source=.",
    ];
    fs::write(host.path("pmem"), vec![0; 2 << 20]).unwrap();
    let more = [
        "-object",
        "memory-backend-ram,id=plug,size=64M",
        "-device",
        "virtio-mem-device,id=vm,memdev=plug,requested-size=0",
        "-drive",
        "id=p,file=pmem,readonly=on",
        "-device",
        "virtio-pmem-device,id=p,drive=p",
    ];
    let output = host.run(&more);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
    for memory in [
        &[][..],
        &["-mem-path", "."],
        &["-mem-path", "ram"],
        &["-mem-prealloc", "-numa", "node,memdev=m", "-object", "memory-backend-memfd,id=m,size=128M,share=on"],
    ] {
        let output = host.run(&[&devices[..], memory].concat());
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{memory:?}");
    }
    assert_eq!(fs::metadata(host.path("ram")).unwrap().len(), 128 << 20);
}
