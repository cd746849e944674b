use std::ffi::OsString;

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
