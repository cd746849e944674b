//! What is told about drives, in the words of QEMU's clients. Only what is known: none of QEMU's fields that would be made up.

use devices::virtio::blk::RequestKind;
use serde_json::{Value, json};

use super::front::Front;
use crate::stratovirt::drive::HostDrive;

/// `query-block`: the devices that there are, and their drives.
pub fn devices(front: &Front) -> Value {
    let backends = front.backends();
    let plugged = backends.drives().filter_map(|(drive, device)| Some((drive, device?)));
    let devices = plugged.map(|(drive, device)| {
        json!({
            "device": drive.id(),
            "qdev": device,
            "type": "unknown",
            "removable": false,
            "locked": false,
            "inserted": node(drive),
        })
    });
    devices.collect()
}

/// `query-named-block-nodes`: the drives, whether they are plugged or not.
pub fn nodes(front: &Front) -> Value {
    front.backends().drives().map(|(drive, _)| node(drive)).collect()
}

/// `query-blockstats`: what guests have done.
pub fn statistics(front: &Front) -> Value {
    let backends = front.backends();
    let drives = backends.drives().map(|(drive, device)| {
        let [read, write, flush, erase] =
            [RequestKind::Read, RequestKind::Write, RequestKind::Flush, RequestKind::Erase]
                .map(|kind| drive.metrics().count(kind));
        json!({
            "device": drive.id(),
            "node-name": drive.id(),
            "qdev": device,
            "stats": {
                "rd_operations": read.operations,
                "rd_bytes": read.bytes,
                "failed_rd_operations": read.failed,
                "wr_operations": write.operations,
                "wr_bytes": write.bytes,
                "failed_wr_operations": write.failed,
                "flush_operations": flush.operations,
                "failed_flush_operations": flush.failed,
                "unmap_operations": erase.operations,
                "failed_unmap_operations": erase.failed,
            },
        })
    });
    drives.collect()
}

fn node(drive: &HostDrive) -> Value {
    let path = drive.path().to_string_lossy();
    let (iops, bps) = drive.rates();
    json!({
        "node-name": drive.id(),
        "drv": "raw",
        "file": path,
        "ro": drive.is_read_only(),
        "encrypted": false,
        "backing_file_depth": 0,
        "detect_zeroes": "off",
        "cache": {"direct": drive.is_direct(), "writeback": true, "no-flush": false},
        "iops": iops,
        "bps": bps,
        "image": {"filename": path, "format": "raw", "virtual-size": drive.size()},
    })
}
