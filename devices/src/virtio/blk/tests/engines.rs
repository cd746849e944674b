//! Every engine and format against a model: a disk is a vector of bytes.

use proptest::prelude::*;

use super::*;
use crate::BusDevice;
use crate::testkit::REGION_SIZE;
use crate::virtio::VirtioDevice;

/// Sectors of a drive under random requests.
const MODEL_SECTORS: u64 = 300;

#[derive(Clone, Debug)]
enum Step {
    Read { sector: u64, sectors: u64, split: u32 },
    Write { sector: u64, sectors: u64, split: u32, fill: u8 },
    Erase { kind: u32, sector: u64, sectors: u32, unmap: bool },
    Flush,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..MODEL_SECTORS + 2, 0..140_u64);
    prop_oneof![
        4 => (place(), 1..4096_u32).prop_map(|((sector, sectors), split)| Step::Read { sector, sectors, split }),
        4 => (place(), 1..4096_u32, any::<u8>())
            .prop_map(|((sector, sectors), split, fill)| Step::Write { sector, sectors, split, fill }),
        2 => (place(), any::<bool>()).prop_map(|((sector, sectors), unmap)| {
            Step::Erase { kind: WRITE_ZEROES, sector, sectors: sectors as u32, unmap }
        }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reset),
    ]
}

/// `len` bytes at `addr` in two buffers that meet at `split`.
fn two(addr: u64, len: u32, split: u32, writable: bool) -> Vec<Buffer> {
    let first = split.min(len);
    vec![Buffer { addr, len: first, writable }, Buffer { addr: addr + u64::from(first), len: len - first, writable }]
}

fn check(config: BlkConfig, data: u64, steps: &[Step]) {
    let mut model = vec![0_u8; MODEL_SECTORS as usize * 512];
    let mut running = start_config(config);
    for (turn, step) in steps.iter().enumerate() {
        let range = |sector: u64, sectors: u64| {
            let range = sector as usize * 512..(sector + sectors) as usize * 512;
            (sector + sectors <= MODEL_SECTORS).then_some(range)
        };
        match *step {
            Step::Read { sector, sectors, split } => {
                let len = sectors as u32 * 512;
                let (status, _) = request(&mut running, READ, sector, &two(data, len, split, true));
                let expected = range(sector, sectors);
                assert_eq!(status == OK, expected.is_some(), "{step:?}");
                if let Some(range) = expected {
                    assert!(running.guest.peek(data, len as usize) == model[range], "{turn} {step:?}");
                }
            }
            Step::Write { sector, sectors, split, fill } => {
                let bytes: Vec<_> = (0..sectors as usize * 512).map(|at| (at / 7) as u8 ^ fill).collect();
                running.guest.poke(data, &bytes);
                let buffers = two(data, bytes.len() as u32, split, false);
                let (status, _) = request(&mut running, WRITE, sector, &buffers);
                let expected = range(sector, sectors);
                assert_eq!(status == OK, expected.is_some(), "{step:?}");
                if let Some(range) = expected {
                    model[range].copy_from_slice(&bytes);
                }
            }
            Step::Erase { kind, sector, sectors, unmap } => {
                let status = erase(&mut running, kind, &[(sector, sectors, unmap.into())]);
                let expected = range(sector, sectors.into());
                assert_eq!(status == OK, expected.is_some(), "{step:?}");
                if let Some(range) = expected {
                    model[range].fill(0);
                }
            }
            Step::Flush => assert_eq!(request(&mut running, FLUSH, 0, &[]), (OK, 1)),
            Step::Reset => {
                running.guest.set_status(0);
                running = running.guest.start(ALL);
            }
        }
    }
    let data = DATA & !4095;
    for sector in 0..MODEL_SECTORS {
        assert_eq!(request(&mut running, READ, sector, &[Buffer::writable(data, 512)]).0, OK);
        assert!(running.guest.peek(data, 512) == model[sector as usize * 512..][..512], "sector {sector}");
    }
}

fn raw() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MODEL_SECTORS * 512).unwrap();
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_requests_leave_what_a_vector_of_bytes_would_have(
        steps in prop::collection::vec(step(), 1..30),
        engine in prop::sample::select(&ENGINES[..]),
        direct in any::<bool>(),
        misaligned in 0..3_u64,
    ) {
        let config = BlkConfig { engine, direct, ..BlkConfig::new("model", raw()) };
        check(config, DATA + misaligned, &steps);
    }

    #[test]
    fn any_requests_to_qcow2_leave_what_a_vector_of_bytes_would_have(
        steps in prop::collection::vec(step(), 1..30),
        engine in prop::sample::select(&[EngineKind::Inline, EngineKind::Threads][..]),
    ) {
        let file = super::qcow2::image(MODEL_SECTORS * 512);
        let format = ImageFormat::Qcow2 { backing: None };
        check(BlkConfig { engine, format, ..BlkConfig::new("model", file) }, DATA + 1, &steps);
    }
}

#[test]
fn a_request_larger_than_a_piece_is_bounced_whole() {
    let len = REGION_SIZE as u32 / 2;
    let data = DATA + 1;
    for engine in ENGINES {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len.into()).unwrap();
        let mut running = start_config(BlkConfig { engine, direct: true, ..BlkConfig::new("direct", file) });
        let bytes: Vec<_> = (0..len).map(|at| (at / 5) as u8).collect();
        running.guest.poke(data, &bytes);
        assert_eq!(request(&mut running, WRITE, 0, &[Buffer::readable(data, len)]), (OK, 1), "{engine:?}");
        running.guest.poke(data, &vec![0; len as usize]);
        assert_eq!(request(&mut running, READ, 0, &[Buffer::writable(data, len)]), (OK, len + 1));
        assert!(running.guest.peek(data, len as usize) == bytes);
    }
}

#[test]
fn an_engine_that_cannot_serve_a_format_is_refused() {
    let file = super::qcow2::image(1 << 20);
    let format = ImageFormat::Qcow2 { backing: None };
    let config = BlkConfig { engine: EngineKind::IoUring, format, ..BlkConfig::new("q", file) };
    assert!(matches!(Blk::new(config, Confinement::On), Err(BlkError { kind: BlkErrorKind::EngineFormat, .. })));
}

#[test]
fn a_drive_moves_with_requests_under_way_and_loses_none() {
    for engine in ENGINES {
        let file = file();
        let device = || Box::new(Blk::new(BlkConfig { engine, ..config(&file) }, Confinement::On).unwrap());
        let mut running = Guest::new(device()).start(ALL | CONFIG_WCE);
        running.guest.transport.write(0x100 + 32, &[0]);
        write_header(&running.guest, READ, 6);
        for _ in 0..80 {
            running.rings[0].offer(&[
                Buffer::readable(HEADER, 16),
                Buffer::writable(DATA, 512),
                Buffer::writable(STATUS, 1),
            ]);
        }
        running.guest.kick(0);
        let mut running = running.move_to(device());
        assert_eq!(running.guest.read_config(32), [0], "The driver's choice moves too");
        let used = running.wait_used(0, 80);
        let mut heads: Vec<_> = used.iter().map(|(head, _)| *head).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..80).map(|index| index * 3).collect::<Vec<_>>(), "{engine:?}");
        assert!(used.iter().all(|(_, len)| *len == 513));
        assert_eq!(running.guest.peek(DATA, 512), [6; 512]);
    }
}

#[test]
fn a_smaller_image_than_the_snapshots_is_refused() {
    let saved = device(&file(), false).save().unwrap();
    for (sectors, fits) in [(SECTORS, true), (SECTORS + 1, true), (SECTORS - 1, false)] {
        let file = file();
        file.set_len(sectors * 512).unwrap();
        assert_eq!(device(&file, false).restore(&saved).is_ok(), fits);
    }
}
