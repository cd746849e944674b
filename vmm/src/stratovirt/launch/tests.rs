use std::ffi::OsString;

use devices::virtio::blk::EngineKind;

use super::*;
use crate::stratovirt::Request;

fn open(words: &[&str]) -> Result<Launch, LaunchError> {
    match CommandLine::parse([&["-kernel", "k"], words].concat().into_iter().map(OsString::from)) {
        Ok(Request::Run(line)) => Launch::open(*line),
        other => panic!("{words:?}: {other:?}"),
    }
}

/// The one drive of a machine, with `properties` of its `-drive` and of its `-device`.
fn drive(backend: &str, device: &str) -> BlkConfig {
    let image = tempfile::NamedTempFile::new().unwrap();
    let backend = format!("id=d,file={}{backend}", image.path().display());
    let device = format!("virtio-blk-device,id=v,drive=d{device}");
    open(&["-drive", &backend, "-device", &device]).unwrap().machine.blk.pop().unwrap()
}

#[test]
fn a_drive_has_the_engine_that_aio_and_direct_ask_for() {
    for (properties, engine, direct) in [
        ("", EngineKind::Threads, true),
        (",direct=off", EngineKind::Inline, false),
        (",direct=off,aio=threads", EngineKind::Threads, false),
        (",aio=native", EngineKind::Threads, true),
        (",aio=io_uring", EngineKind::IoUring, true),
        (",direct=off,aio=io_uring", EngineKind::IoUring, false),
    ] {
        let drive = drive(properties, "");
        assert_eq!((drive.engine, drive.direct), (engine, direct), "{properties}");
    }
}

#[test]
fn a_drive_has_its_queues_and_limits() {
    let plain = drive("", "");
    assert_eq!((plain.queues, plain.queue_size, plain.limits), (1, 256, RateLimits::default()));
    let per_second = |rate| NonZeroU64::new(rate).map(BucketConfig::per_second);
    let drive_of = |limits| drive(limits, ",num-queues=4,queue-size=512");
    let limited = drive_of(",throttling.iops-total=100,throttling.bps-total=4096");
    assert_eq!((limited.queues, limited.queue_size), (4, 512));
    assert_eq!(limited.limits, RateLimits { ops: per_second(100), bytes: per_second(4096) });
    assert!(drive_of(",throttling.iops-total=0").limits.is_unlimited());
}

/// A machine whose entropy has these properties.
fn entropy(properties: &str) -> Result<Option<BucketConfig>, LaunchError> {
    let device = format!("virtio-rng-device,rng=r,id=d{properties}");
    let launch = open(&["-object", "rng-random,id=r,filename=/dev/urandom", "-device", &device])?;
    Ok(launch.machine.rng.unwrap().limits.bytes)
}

#[test]
fn entropy_has_its_limit_in_each_period() {
    assert_eq!(entropy("").unwrap(), None);
    let bucket = entropy(",max-bytes=1024,period=500").unwrap().unwrap();
    assert_eq!((bucket.size.get(), bucket.one_time_burst, bucket.refill_ns.get()), (1024, 0, 500_000_000));
    // A period that nothing is counted in.
    assert_eq!(entropy(",period=500").unwrap(), None);
    assert!(entropy(",max-bytes=64,period=1000").is_ok() && entropy(",max-bytes=1000000000,period=1000").is_ok());
    for refused in [
        ",max-bytes=1024",
        ",max-bytes=1024,period=0",
        ",max-bytes=63,period=1000",
        ",max-bytes=1000000001,period=1000",
        ",max-bytes=0,period=1",
        ",max-bytes=18446744073709551615,period=18446744073709551615",
    ] {
        assert!(matches!(entropy(refused), Err(LaunchError::Conflict { .. })), "{refused}");
    }
}

#[test]
fn auto_balloon_is_what_free_page_reporting_does() {
    for (properties, reporting) in [("", false), (",free-page-reporting=on", true), (",auto-balloon=on", true)] {
        let device = format!("virtio-balloon-device,id=b{properties}");
        let balloon = open(&["-device", &device]).unwrap().machine.balloon.unwrap();
        assert_eq!(balloon.free_page_reporting, reporting, "{properties}");
    }
}

#[test]
fn what_qmp_tells_is_what_was_opened() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("disk"), [0; 512]).unwrap();
    let launch = open(&[
        "-drive",
        &format!("id=d,file={},readonly=on,direct=off", path("disk")),
        "-device",
        "virtio-blk-device,id=v,drive=d",
        "-object",
        "iothread,id=io1",
        "-object",
        "iothread,id=io2",
        "-serial",
        &format!("file,path={}", path("log")),
        "-device",
        "virtio-serial-device",
        "-chardev",
        &format!("socket,id=c,path={},server,nowait", path("hvc")),
        "-device",
        "virtconsole,id=p,chardev=c",
    ])
    .unwrap();
    let Inventory { drives, streams, iothreads, memory: None } = launch.inventory else { panic!("memory") };
    let drives: Vec<_> = drives.iter().map(|(device, drive)| (device.as_str(), drive.id(), drive.size())).collect();
    assert_eq!(drives, [("v", "d", Some(512))]);
    assert_eq!(iothreads, ["io1", "io2"]);
    let entry = |label: &str, filename| StreamEntry { label: label.into(), filename };
    assert_eq!(
        streams,
        [entry("c", format!("unix:{},server", path("hvc"))), entry("serial0", format!("file:{}", path("log"))),]
    );
}
