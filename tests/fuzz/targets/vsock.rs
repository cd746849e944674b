//! Packets of a guest whose host connects, listens, writes and hangs up (virtio 1.2 section 5.10.6).

#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use devices::testkit::memory;
use devices::virtio::vsock::{HostEnd, Vsock, VsockConfig};
use inlay_fuzz::{Case, Request, play_with};
use libfuzzer_sys::fuzz_target;

const GUEST: u64 = 3;
const HOST: u64 = 2;
const LISTENED: u32 = 1024;
/// The first of the ports that the device gives to the host's ends.
const FIRST_HOST_PORT: u32 = 1 << 30;

#[derive(Arbitrary, Debug)]
enum VsockRequest {
    Packet(Packet),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Packet {
    src_cid: Option<u64>,
    dst_cid: Option<u64>,
    src_port: u8,
    dst_port: u8,
    len: Option<u32>,
    kind: Option<u16>,
    op: u8,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    payload: Vec<u8>,
}

impl Request for VsockRequest {
    fn queue(&self) -> Option<u8> {
        matches!(self, Self::Packet(_)).then_some(1)
    }

    fn bytes(&self) -> Vec<u8> {
        let packet = match self {
            Self::Bytes(bytes) => return bytes.clone(),
            Self::Packet(packet) => packet,
        };
        let dst_port = match packet.dst_port {
            0..128 => LISTENED,
            port => FIRST_HOST_PORT + u32::from(port - 128),
        };
        let len = packet.len.unwrap_or(packet.payload.len() as u32);
        [
            &packet.src_cid.unwrap_or(GUEST).to_le_bytes()[..],
            &packet.dst_cid.unwrap_or(HOST).to_le_bytes(),
            &(LISTENED + u32::from(packet.src_port % 4)).to_le_bytes(),
            &dst_port.to_le_bytes(),
            &len.to_le_bytes(),
            &packet.kind.unwrap_or(1).to_le_bytes(),
            &u16::from(packet.op % 9).to_le_bytes(),
            &packet.flags.to_le_bytes(),
            &packet.buf_alloc.to_le_bytes(),
            &packet.fwd_cnt.to_le_bytes(),
            &packet.payload,
        ]
        .concat()
    }
}

fuzz_target!(|case: Case<VsockRequest>| {
    let (vsock, connector) = Vsock::new(VsockConfig { guest_cid: GUEST, uds_path: None }).expect("A socket device");
    let accepted = Arc::new(Mutex::new(Vec::<UnixStream>::new()));
    let ends = Arc::clone(&accepted);
    connector.listen(
        LISTENED,
        Box::new(move |stream| {
            stream.set_nonblocking(true).expect("A socket that does not wait");
            ends.lock().expect("Ends").push(stream);
        }),
    );
    let made = RefCell::new(Vec::new());
    let host = move |said: &[u8]| {
        let mut ends = accepted.lock().expect("Ends");
        ends.append(&mut made.borrow_mut());
        match said {
            [] => {
                let (ours, theirs) = UnixStream::pair().expect("A pair of sockets");
                ours.set_nonblocking(true).expect("A socket that does not wait");
                connector.connect(LISTENED, HostEnd::Duplex(theirs.into()), Box::new(drop));
                made.borrow_mut().push(ours);
            }
            [0] => drop(ends.pop()),
            [1] => ends.iter_mut().for_each(|end| drop(end.read(&mut [0; 4096]))),
            said => ends.iter_mut().for_each(|end| drop(end.write(said))),
        }
    };
    play_with(Box::new(vsock), memory(), &case, Box::new(host));
});
