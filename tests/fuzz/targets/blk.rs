//! Requests to a disk (virtio 1.2 section 5.2.6).

#![no_main]

use std::fs::File;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use devices::virtio::blk::{Blk, BlkConfig, EngineKind};
use inlay_fuzz::{Case, Request, play};
use libfuzzer_sys::fuzz_target;
use seccomp::Confinement;

const SECTORS: u64 = 64;

static IMAGE: LazyLock<File> = LazyLock::new(|| {
    let image = tempfile::tempfile().expect("An image");
    image.set_len(SECTORS * 512).expect("An image of some sectors");
    image
});

#[derive(Arbitrary, Debug)]
struct DiskRequest {
    kind: Kind,
    reserved: u32,
    sector: u8,
    far: Option<u64>,
    data: Data,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    In,
    Out,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Other(u32),
}

#[derive(Arbitrary, Debug)]
enum Data {
    None,
    Sectors(u8),
    Bytes(Vec<u8>),
    /// Of a discard: sector, count, flags.
    Ranges(Vec<(u8, u32, u8)>),
}

impl Request for DiskRequest {
    fn bytes(&self) -> Vec<u8> {
        let kind: u32 = match self.kind {
            Kind::In => 0,
            Kind::Out => 1,
            Kind::Flush => 4,
            Kind::GetId => 8,
            Kind::Discard => 11,
            Kind::WriteZeroes => 13,
            Kind::Other(kind) => kind,
        };
        let sector = self.far.unwrap_or(self.sector.into());
        let mut bytes = [&kind.to_le_bytes()[..], &self.reserved.to_le_bytes(), &sector.to_le_bytes()].concat();
        match &self.data {
            Data::None => {}
            Data::Sectors(count) => bytes.resize(bytes.len() + usize::from(*count % 24) * 512, 0xa5),
            Data::Bytes(data) => bytes.extend(data),
            Data::Ranges(ranges) => bytes.extend(ranges.iter().flat_map(|(sector, count, flags)| {
                [&u64::from(*sector).to_le_bytes()[..], &count.to_le_bytes(), &u32::from(*flags).to_le_bytes()].concat()
            })),
        }
        bytes
    }
}

fuzz_target!(|input: (bool, Case<DiskRequest>)| {
    let (read_only, case) = input;
    let file = IMAGE.try_clone().expect("The image again");
    // The same input does the same each time.
    let engine = EngineKind::Inline;
    let config = BlkConfig { read_only, serial: "serial".into(), queues: 2, engine, ..BlkConfig::new("disk", file) };
    play(Box::new(Blk::new(config, Confinement::On).expect("A disk")), &case);
    assert_eq!(IMAGE.metadata().expect("An image").len(), SECTORS * 512, "No request makes a disk larger");
});
