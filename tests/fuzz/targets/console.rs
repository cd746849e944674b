//! Output, input and control messages of a console device (virtio 1.2 section 5.3.6).

#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use devices::testkit::memory;
use devices::virtio::console::{Console, ConsoleConfig, PortConfig, PortEnd};
use inlay_fuzz::{Case, Request, play_with};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum ConsoleRequest {
    Control { port: u8, far: Option<u32>, event: u8, value: u16, tail: Vec<u8> },
    Bytes(Vec<u8>),
}

impl Request for ConsoleRequest {
    fn queue(&self) -> Option<u8> {
        matches!(self, Self::Control { .. }).then_some(3)
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Control { port, far, event, value, tail } => [
                &far.unwrap_or(u32::from(*port % 4)).to_le_bytes()[..],
                &u16::from(*event % 10).to_le_bytes(),
                &value.to_le_bytes(),
                tail,
            ]
            .concat(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

fuzz_target!(|case: Case<ConsoleRequest>| {
    let (mut ours, theirs) = UnixStream::pair().expect("A pair of sockets");
    ours.set_nonblocking(true).expect("A socket that does not wait");
    let input = File::from(OwnedFd::from(theirs));
    let output = input.try_clone().expect("The other direction");
    let streams = PortEnd::Streams { input: Some(input), output: Some(output) };
    let silent = PortEnd::Streams { input: None, output: None };
    let ports = vec![
        PortConfig { number: 0, console: true, name: None, host: streams },
        PortConfig { number: 1, console: false, name: Some("port".into()), host: silent },
    ];
    let console = Console::new(ConsoleConfig { ports }).expect("A console");
    let host = move |said: &[u8]| match said {
        [] => drop(ours.read(&mut [0; 4096])),
        [0] => drop(ours.shutdown(std::net::Shutdown::Both)),
        said => drop(ours.write(said)),
    };
    play_with(Box::new(console), memory(), &case, Box::new(host));
});
