use proptest::prelude::*;

use super::backend::Aio;
use super::values::{Mac, Place, Size};
use super::*;

/// kata's command line for a sandbox with an image, a console for debugging, a network and virtio-fs.
const KATA: &[&str] = &[
    "-name",
    "sandbox-0123",
    "-uuid",
    "2b2c7a4e-7a5c-4bd8-8d5c-0f4a3f8d1a2b",
    "-smp",
    "2",
    "-m",
    "2048",
    "-kernel",
    "/k",
    "-append",
    "root=/dev/vda reboot=k panic=1 -- -x",
    "-qmp",
    "unix:/run/vc/vm/x/qmp.socket,server,nowait",
    "-D",
    "-disable-seccomp",
    "-machine",
    "type=microvm,dump-guest-core=off,mem-share=on",
    "-object",
    "rng-random,id=objrng0,filename=/dev/urandom",
    "-device",
    "virtio-rng-device,rng=objrng0,id=virtio-rng0",
    "-device",
    "virtio-serial-device,id=virtio-serial0",
    "-chardev",
    "socket,id=charconsole0,path=/run/vc/vm/x/console.socket,server,nowait",
    "-device",
    "virtconsole,chardev=charconsole0,id=virtio-console0,nr=0",
    "-drive",
    "id=rootfs,file=/img,readonly=on,direct=off",
    "-device",
    "virtio-blk-device,drive=rootfs,id=virtio-blk0",
    "-device",
    "vhost-vsock-device,id=vsock-id,guest-cid=1234567,vhostfd=3",
    "-netdev",
    "tap,id=eth0,fds=4:5",
    "-device",
    "virtio-net-device,netdev=eth0,id=eth0,mac=02:00:ca:fe:00:01",
    "-chardev",
    "socket,id=virtio_fs,path=/run/vc/vm/x/virtiofs_kata.socket,server,nowait",
    "-device",
    "vhost-user-fs-device,chardev=virtio_fs,tag=kataShared,id=virtio-fs0",
];

fn request(words: &[&str]) -> Result<Request, CommandLineError> {
    CommandLine::parse(words.iter().map(OsString::from))
}

fn parse(words: &[&str]) -> CommandLine {
    match request(words) {
        Ok(Request::Run(line)) => *line,
        other => panic!("{words:?}: {other:?}"),
    }
}

/// A command line that is only `words` and a kernel.
fn with(words: &[&str]) -> CommandLine {
    parse(&[&["-kernel", "k"], words].concat())
}

/// The whole sentence of a refusal.
fn refusal(words: &[&str]) -> String {
    let error = match request(&[&["-kernel", "k"], words].concat()) {
        Err(error) => error,
        other => panic!("{words:?}: {other:?}"),
    };
    match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

#[test]
fn katas_command_line_is_read_whole() {
    let line = parse(KATA);
    assert_eq!(line.name.as_deref(), Some("sandbox-0123"));
    assert_eq!(line.smp.as_ref().map(|smp| smp.cpus), Some(2));
    assert_eq!(line.memory, Some(Memory { size: Size(2 << 30) }));
    assert_eq!(line.machine, Some(MachineOption { dump_guest_core: false, mem_share: true }));
    assert_eq!(line.append.as_deref(), Some("root=/dev/vda reboot=k panic=1 -- -x"));
    assert_eq!(line.log, Some(None));
    assert!(line.disable_seccomp && !line.freeze && !line.daemonize);
    let address = Place::Unix("/run/vc/vm/x/qmp.socket".into());
    assert_eq!(line.qmp, [Qmp { address, server: true, nowait: true }]);
    assert_eq!(
        line.device.iter().filter_map(Device::id).collect::<Vec<_>>(),
        ["virtio-rng0", "virtio-serial0", "virtio-console0", "virtio-blk0", "vsock-id", "eth0", "virtio-fs0"]
    );
    let [Drive { id, readonly: true, direct: Some(false), .. }] = &line.drive[..] else { panic!("{:?}", line.drive) };
    assert_eq!((id.as_str(), line.drive[0].engine()), ("rootfs", Aio::Off));
    let [Netdev::Tap(tap)] = &line.netdev[..] else { panic!("{:?}", line.netdev) };
    assert_eq!((tap.descriptors(), tap.vhost), (vec![4, 5], false));
    let Device::VirtioNetDevice(net) = &line.device[5] else { panic!("{:?}", line.device) };
    assert_eq!(net.mac, Some(Mac([2, 0, 0xca, 0xfe, 0, 1])));
    assert_eq!(line.chardev.iter().filter_map(Chardev::id).collect::<Vec<_>>(), ["charconsole0", "virtio_fs"]);
}

#[test]
fn an_option_without_a_name_for_its_first_property_reads_like_one_with_it() {
    for (short, long) in [
        (["-machine", "microvm,mem-share=on"], ["-machine", "mem-share=on,type=microvm"]),
        (["-smp", "4"], ["-smp", "cpus=4"]),
        (["-m", "512M"], ["-m", "size=0.5G"]),
        (["-m", "1g"], ["-m", "size=1024"]),
    ] {
        if long[1] == "size=0.5G" {
            assert!(refusal(&long).contains("it is a number"), "{long:?}");
        } else {
            assert_eq!(with(&short), with(&long));
        }
    }
}

#[test]
fn defaults_are_stratovirts() {
    let line = with(&["-machine", "microvm", "-drive", "id=d,file=f", "-incoming", "file:/t"]);
    assert_eq!(line.machine, Some(MachineOption { dump_guest_core: true, mem_share: false }));
    assert_eq!((line.drive[0].is_direct(), line.drive[0].engine()), (true, Aio::Native));
    assert_eq!(line.incoming, Some(Incoming { from: Place::File("/t".into()) }));
    assert_eq!((line.smp, line.memory, line.log), (None, None, None));
    assert!(!line.disable_seccomp);
}

#[test]
fn a_comma_in_a_value_is_written_twice() {
    assert_eq!(with(&["-drive", "id=d,file=/a,,b,readonly"]).drive[0].file, PathBuf::from("/a,b"));
}

#[test]
fn every_form_of_serial_is_read() {
    let serial = |text| with(&["-serial", text]).serial.expect("serial");
    assert_eq!(serial("chardev:c"), Serial::Named("c".into()));
    for text in ["stdio", "pty", "null", "file,path=/x", "socket,path=/s,server,nowait"] {
        assert!(matches!(serial(text), Serial::Own(_)), "{text}");
    }
    let Serial::Own(Chardev::Socket(socket)) = serial("socket,host=127.0.0.1,port=5,server") else { panic!() };
    assert_eq!(socket.place(), Some(Place::Tcp(([127, 0, 0, 1], 5).into())));
    assert!(socket.server && !socket.nowait);
}

#[test]
fn the_log_takes_a_file_or_the_next_option() {
    assert_eq!(with(&["-D", "/log", "-S"]).log, Some(Some("/log".into())));
    let line = with(&["-D", "-S"]);
    assert_eq!((line.log, line.freeze), (Some(None), true));
}

#[test]
fn what_libvirt_gives_changes_nothing() {
    let words = [
        "-overcommit",
        "mem-lock=off",
        "-uuid",
        "-x",
        "-no-user-config",
        "-nodefaults",
        "-sandbox",
        "on",
        "-msg",
        "timestamp=on",
        "-rtc",
        "base=utc",
        "-no-shutdown",
        "-boot",
        "strict=on",
        "-nographic",
        "-realtime",
        "mlock=off",
        "-display",
        "none",
        "-usb",
        "-cpu",
        "host,pmu=off",
        "-accel",
        "kvm",
    ];
    assert_eq!(with(&words), with(&[]));
}

#[test]
fn topologies_have_as_many_processors_as_the_machine() {
    let consistent = |text| with(&["-smp", text]).smp.expect("smp").is_consistent();
    for good in ["1", "4,sockets=1,dies=1,cores=2,threads=2", "2,maxcpus=4,sockets=2", "254"] {
        assert!(consistent(good), "{good}");
    }
    for bad in ["4,sockets=1,cores=1,threads=1", "4,maxcpus=2", "4,cores=3", "4,cores=0"] {
        assert!(!consistent(bad), "{bad}");
    }
}

#[test]
fn refusals_name_the_option_the_property_and_the_reason() {
    for (words, sentence) in [
        (&["-frob"][..], "There is no option -frob"),
        (&["--machine", "microvm"], "There is no option --machine: options have one dash"),
        (&["stray"], "There is no option stray"),
        (&["-"], "There is no option -"),
        (&["-machine"], "Option -machine has no value"),
        (&["-initrd", "a", "-initrd", "b"], "Option -initrd is given twice"),
        (&["-pidfile", "p"], "Option -daemonize is missing"),
        (
            &["-mod-test", "s"],
            "Option -mod-test is not for this machine: a microvm is tested with guests, not from outside",
        ),
        (
            &["-machine", "q35"],
            "Option -machine cannot be \"q35\": The property type=q35 is not for this machine: \
             every other machine has a PCI bus and firmware",
        ),
        (&["-smp", "256"], "invalid value: integer `256`, expected u8"),
        (&["-smp", "x"], "The property cpus cannot be \"x\": it is not a number"),
        (
            &["-drive", "id=a,file=b,id=c"],
            "Option -drive cannot be \"id=a,file=b,id=c\": The property id is given twice",
        ),
        (&["-drive", "file=b"], "The property id is missing"),
        (&["-drive", "id=a,,file=b,"], "A property is empty"),
        (&["-drive", ""], "A property is empty"),
        (&["-drive", "id=a,file=b,aio=fast"], "there are off, native, io_uring, threads"),
        (&["-drive", "id=a,file=b,format=qcow2"], "the format of an image is never guessed"),
        (&["-drive", "id=a,file=b,cache=none"], "There is no property cache, there are id, file"),
        (&["-device", "virtio-blk-device,id=a,drive=a,addr=0x1"], "a microvm has no PCI bus"),
        (&["-device", "virtio-blk-pci,id=a"], "virtio-blk-pci is not for this machine: a microvm has no PCI bus"),
        (&["-device", "floppy"], "\"floppy\" is not known here, there are virtio-blk-device"),
        (&["-qmp", "exec:cat,server"], "it is unix:PATH, tcp:IP:PORT or file:DIR"),
        (&["-netdev", "tap,id=a,vhost=maybe"], "The property vhost cannot be \"maybe\": it is on or off"),
        (&["-cpu", "max"], "guests see the host's processor"),
    ] {
        let text = refusal(words);
        assert!(text.contains(sentence), "{words:?}: {text}");
    }
}

#[test]
fn a_machine_needs_a_kernel() {
    let error = request(&["-machine", "microvm"]).expect_err("no kernel");
    assert_eq!(error.to_string(), "Option -kernel is missing");
}

#[test]
fn lists_and_lines_are_bounded() {
    let list = |items: usize| {
        let more: Vec<_> = (0..items - 2).map(|_| "iothread=x").collect();
        format!("virtio-rng-device,rng=r,{}", more.join(","))
    };
    with(&["-device", &list(list::MAX_ITEMS)]);
    assert!(refusal(&["-device", &list(list::MAX_ITEMS + 1)]).contains("more than 64 properties"));
    let mut words = vec!["-usb"; MAX_WORDS];
    assert_eq!(request(&words), Err(CommandLineError::Use { option: "-usb".into(), problem: "is given twice" }));
    words.push("-usb");
    assert_eq!(request(&words), Err(CommandLineError::TooLong));
}

#[test]
fn the_help_has_every_option_with_one_dash() {
    for word in ["-help", "--help", "-h"] {
        let Ok(Request::Print(text)) = request(&[word]) else { panic!("{word}") };
        assert!(!text.contains("--"), "{text}");
        assert!(text.starts_with(ABOUT), "{text}");
        for option in ["-machine", "-kernel", "-drive", "-qmp", "-daemonize", "-S", "-D", "-m ", "-cpu", "-incoming"] {
            assert!(text.contains(option), "{option}: {text}");
        }
        assert!(!text.contains("-realtime"), "{text}");
    }
    assert!(matches!(request(&["-version"]), Ok(Request::Print(text)) if text.contains(env!("CARGO_PKG_VERSION"))));
}

/// What the table says of refusals is what the parser does.
#[test]
fn every_entry_of_the_table_is_followed() {
    for (option, operand, support) in support::OPTIONS {
        let option = format!("-{option}");
        let words: &[&str] = match operand {
            Operand::None => &[&option],
            Operand::Any => &[&option, "x"],
            Operand::List(_) => continue,
        };
        match support {
            Support::Refused(why) => assert!(refusal(words).ends_with(why), "{option}"),
            _ => assert_eq!(with(words), with(&[]), "{option}"),
        }
    }
    for option in ["numa", "chardev", "serial", "object", "device"] {
        for (kind, support) in support::kinds(option) {
            if let Support::Refused(why) = support {
                assert!(refusal(&[&format!("-{option}"), kind]).ends_with(why), "{option} {kind}");
            }
        }
    }
    for (option, list) in [
        ("machine", "type=microvm"),
        ("accel", ""),
        ("cpu", ""),
        ("m", "size=1"),
        ("drive", "id=d,file=f"),
        ("netdev", "tap,id=n"),
        ("device", "virtio-blk-device,id=d,drive=d"),
        ("numa", "node"),
        ("mon", "chardev=c"),
        ("qmp", "address=unix:p"),
    ] {
        let kind = list.split(',').next().filter(|kind| !kind.contains('=')).unwrap_or_default();
        let entries = support::properties(option).filter(|entry| entry.0 == kind || entry.0 == "*");
        for (_, property, support) in entries.filter(|entry| !list.contains(&format!("{}=", entry.1))) {
            let given = |value: &str| format!("{list},{property}={value}").trim_start_matches(',').to_owned();
            let option = format!("-{option}");
            match support {
                Support::Refused(why) => {
                    assert!(refusal(&[&option, &given("x")]).ends_with(why), "{option} {property}")
                }
                Support::Only { values, why } => {
                    assert!(refusal(&[&option, &given("nonsense")]).ends_with(why), "{option} {property}");
                    with(&[&option, &given(values[0])]);
                }
                Support::Ignored(_) => drop(with(&[&option, &given("7")])),
                _ => {}
            }
        }
    }
}

/// Set `UPDATE_DOCS=1` to write it.
#[test]
fn the_documentation_has_the_parsers_table() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/stratovirt.md");
    let text = std::fs::read_to_string(path).expect("docs/stratovirt.md");
    let (begin, end) = ("<!-- options: begin -->\n", "<!-- options: end -->");
    let (head, rest) = text.split_once(begin).expect("the mark of the beginning");
    let (table, tail) = rest.split_once(end).expect("the mark of the end");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, format!("{head}{begin}{}{end}{tail}", markdown())).expect("write");
    } else {
        assert!(
            table == markdown(),
            "docs/stratovirt.md is not what the parser does: run this test with UPDATE_DOCS=1"
        );
    }
}

proptest! {
    #[test]
    fn no_words_make_the_parser_panic(words in proptest::collection::vec("\\PC{0,24}|-[a-zA-Z-]{0,14}|[a-z-]{1,12}(,[a-z.-]{0,9}=?[^ ]{0,9}){0,6}", 0..12)) {
        let _ = CommandLine::parse(words.into_iter().map(OsString::from));
    }

    #[test]
    fn no_list_makes_an_option_panic(option in 0_usize..14, list in "[a-z-]{1,22}(,[a-z.-]{0,9}=?[^ ]{0,9}){0,6}|\\PC{0,40}") {
        let names = ["-machine", "-smp", "-m", "-numa", "-object", "-incoming", "-device", "-drive", "-netdev", "-chardev",
            "-serial", "-qmp", "-mon", "-cpu"];
        let _ = CommandLine::parse(["-kernel", "k", names[option], &list].map(OsString::from));
    }
}
