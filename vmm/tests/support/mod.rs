//! Tiny guests, assembled by hand, and machines to run them in.

#![allow(dead_code, reason = "each test binary uses a part")]

pub mod script;
pub mod virtio;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use tempfile::NamedTempFile;
use vmm::{BootConfig, ExitReason, Machine, MachineConfig, MemoryConfig};

pub const SERIAL_PORT: u16 = 0x3f8;
pub const DEBUG_PORT: u16 = 0x80;
pub const EXIT_PORT: u16 = 0x505;
pub const I8042_PORT: u16 = 0x64;

/// Whether this machine can run guests; says so where it cannot, with the reason.
pub fn kvm_available(test: &str) -> bool {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: {test}: /dev/kvm: {error}");
            false
        }
    }
}

/// Ends the test unless it can run guests.
#[macro_export]
macro_rules! need_kvm {
    () => {
        fn here() {}
        if !support::kvm_available(std::any::type_name_of_val(&here).trim_end_matches("::here")) {
            return;
        }
    };
}

/// Machine code that means the same in 32-bit and 64-bit mode.
#[derive(Default, Clone)]
pub struct Code(Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(SERIAL_PORT, byte))
    }

    /// `ud2`, and no interrupt table: a triple fault.
    pub fn triple_fault(self) -> Self {
        self.bytes(&[0x0f, 0x0b])
    }

    /// `jmp $`
    pub fn spin(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// `cli; hlt; jmp -3`
    pub fn halt(self) -> Self {
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfc])
    }

    /// `mov dword [address], value`; in 32-bit mode only.
    pub fn store(self, address: u32, value: u32) -> Self {
        self.bytes(&[0xc7, 0x05]).bytes(&address.to_le_bytes()).bytes(&value.to_le_bytes())
    }

    /// `cmp word [address], value; jne -11`: waits for the value; in 32-bit mode only.
    pub fn wait_for(self, address: u32, value: u16) -> Self {
        self.bytes(&[0x66, 0x81, 0x3d]).bytes(&address.to_le_bytes()).bytes(&value.to_le_bytes()).bytes(&[0x75, 0xf5])
    }

    /// `mov esi, address; mov ecx, length; mov dx, 0x3f8; rep outsb`
    pub fn print_memory(self, address: u32, length: u32) -> Self {
        let code = self.bytes(&[0xbe]).bytes(&address.to_le_bytes()).bytes(&[0xb9]).bytes(&length.to_le_bytes());
        code.bytes(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As a flat kernel: entered in 64-bit mode at 16 MiB.
    pub fn flat(&self) -> NamedTempFile {
        file(&self.0)
    }

    /// As an ELF kernel with a PVH note: entered in 32-bit mode.
    pub fn pvh(&self) -> NamedTempFile {
        file(&elf(&self.0, true))
    }

    /// As an ELF kernel without: entered in 64-bit mode.
    pub fn elf(&self) -> NamedTempFile {
        file(&elf(&self.0, false))
    }
}

pub fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("temporary file");
    file.write_all(bytes).expect("write");
    file
}

pub const ELF_BASE: u64 = 0x10_0000;
pub const ELF_CODE_OFFSET: u64 = 0x1000;

/// An ELF executable of one segment at 1 MiB, with or without a PVH note.
pub fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    let entry = ELF_BASE;
    let code_length = code.len() as u64;
    let mut note = Vec::new();
    if pvh {
        for field in [4u32, 4, 18] {
            note.extend(field.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(u32::try_from(entry).expect("low").to_le_bytes());
    }
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend(2u16.to_le_bytes());
    bytes.extend(62u16.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    for address in [entry, 64, 0] {
        bytes.extend(address.to_le_bytes());
    }
    bytes.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        bytes.extend(half.to_le_bytes());
    }
    let mut program_header = |kind: u32, offset: u64, address: u64, file_size: u64, memory_size: u64| {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(7u32.to_le_bytes());
        for field in [offset, address, address, file_size, memory_size, 0x1000] {
            bytes.extend(field.to_le_bytes());
        }
    };
    program_header(1, ELF_CODE_OFFSET, ELF_BASE, code_length, code_length + 0x1000);
    program_header(4, 0x200, 0, note.len() as u64, note.len() as u64);
    bytes.resize(0x200, 0);
    bytes.extend(note);
    bytes.resize(0x1000, 0);
    bytes.extend(code);
    bytes
}

pub fn config(kernel: &Path) -> MachineConfig {
    let boot = BootConfig { kernel: kernel.into(), initrd: None, cmdline: "console=ttyS0".into() };
    MachineConfig::new("test", MemoryConfig::from_mib(128), boot)
}

/// Waits for the machine's end, but not for ever.
pub fn wait(machine: &Machine) -> ExitReason {
    assert!(ended_within(machine, 20_000), "the machine has not ended, console: {:?}", console(machine));
    machine.wait()
}

/// Whether the machine's exit descriptor becomes readable within so many milliseconds.
pub fn ended_within(machine: &Machine, milliseconds: i32) -> bool {
    let mut poll = libc::pollfd { fd: machine.exit_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    unsafe { libc::poll(&mut poll, 1, milliseconds) == 1 }
}

pub fn console(machine: &Machine) -> String {
    String::from_utf8_lossy(&machine.console_tail()).into_owned()
}

/// Builds, starts and waits.
pub fn run(kernel: &Path) -> (Machine, ExitReason) {
    let machine = Machine::build(config(kernel)).expect("build");
    machine.start().expect("start");
    let reason = wait(&machine);
    (machine, reason)
}

/// An error with its causes, as a program would print it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
