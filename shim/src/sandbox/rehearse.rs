//! Which pages a start asks for, or writes to, first: a sandbox and a container are started from a template that is being made, and
//! given up.
//!
//! What is recorded is thus the same for every start, and no guest of somebody's can put anything in it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_proto::agent::CreateContainerRequest;
use agent_proto::{NULL_STREAM_PORT, oci as wire};
use oci_spec::runtime::{Mount, Spec};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use vmm::{HostEnd, WorkingSet, WorkingSetError};

use super::agent::AgentError;
use super::guest::{BootError, ConnectError, Guest, Home};
use super::identity;
use super::saved::Saved;
use super::start::sandbox_request;
use crate::config::TemplateMemory;
use crate::ids::Id;
use crate::main_thread::Ended;
use crate::oci::{self, SpecError};
use crate::resources::share::{GUEST_SHARE, ROOTFS};

/// Name of the only file of the container's root file system.
const PROGRAM: &str = "program";
/// What the program writes.
const OUTPUT: u8 = b'.';
/// Longest time from the container's start to its end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no working set.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// The guest.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Its agent.
    #[error("The guest's agent cannot start a container")]
    Agent(#[from] AgentError),
    /// The container's output.
    #[error("The container's output cannot be had")]
    Output(#[from] ConnectError),
    /// The container's specification.
    #[error("The container cannot be described")]
    Spec(#[from] SpecError),
    /// The container's files, or what the kernel says of the guest's memory.
    #[error("The container's files cannot be made, or its memory cannot be looked at")]
    Files(#[from] io::Error),
    /// The thread that made the machine is gone.
    #[error("Nobody can look at the guest's memory")]
    Thread(#[from] Ended),
    /// What was written makes no set.
    #[error("The guest's memory is not what it was")]
    Set(#[from] WorkingSetError),
    /// The container does not do what it is for.
    #[error("The container has ended with {status} and written {output:?}")]
    Container {
        /// Its exit status.
        status: i32,
        /// Its output.
        output: Vec<u8>,
    },
    /// It does not end.
    #[error("The container did not end within {} s", PATIENCE.as_secs())]
    Deadline,
    /// The host serves no page faults.
    #[error("The guest's memory does not come page by page on this host")]
    Mapped,
}

/// Starts a sandbox from `saved` and a container in it, whose files are left in the home's share, and returns the pages that were asked
/// for, in their order; those that were written to where `memory` is mapped, those until the agent answered first.
pub async fn rehearse(home: &Home<'_>, saved: Saved, memory: TemplateMemory) -> Result<WorkingSet, RehearsalError> {
    let guest = Guest::restore(home, saved).await?;
    let recorded = async {
        let written = || {
            home.main.run({
                let machine = Arc::clone(guest.machine());
                move || machine.written_memory()
            })
        };
        match (memory, guest.machine().lazy_memory()) {
            (TemplateMemory::Mapped, _) => {
                let first = written().await??;
                start(home, &guest).await?;
                Ok(first.merge(&written().await??)?)
            }
            (TemplateMemory::Lazy, Some(memory)) => start(home, &guest).await.map(|()| memory.working_set()),
            (TemplateMemory::Lazy, None) => Err(RehearsalError::Mapped),
        }
    };
    let recorded = recorded.await;
    guest.stop().await;
    recorded
}

async fn start(home: &Home<'_>, guest: &Guest) -> Result<(), RehearsalError> {
    let request = sandbox_request(home.name, home.name.to_string());
    tokio::try_join!(guest.agent.create_sandbox(&request), identity::set_clock(&guest.agent))?;

    make_rootfs(&home.shared.join(home.name.as_str()))?;
    let (mut output, end) = UnixStream::pair()?;
    let stdout_port = guest.connect_stream(HostEnd::Sink(end.into_std()?.into())).await?;
    let request = CreateContainerRequest { stdout_port, ..container_request(home.name)? };
    guest.agent.create_container(&request).await?;
    guest.agent.start_container(home.name).await?;
    let ended = async {
        let status = guest.agent.wait(home.name, None).await?;
        let mut written = vec![0; 2];
        let length = output.read(&mut written).await?;
        written.truncate(length);
        Ok::<_, RehearsalError>((status, written))
    };
    let (status, written) = tokio::time::timeout(PATIENCE, ended).await.map_err(|_| RehearsalError::Deadline)??;
    if status != 0 || written != [OUTPUT] {
        return Err(RehearsalError::Container { status, output: written });
    }
    Ok(())
}

/// A container as `ctr run` makes one.
fn container_request(id: &Id) -> Result<CreateContainerRequest, SpecError> {
    let mut spec = Spec::default();
    if let Some(root) = spec.root_mut() {
        root.set_readonly(None);
    }
    if let Some(process) = spec.process_mut() {
        process.set_args(Some(vec![format!("/{PROGRAM}")]));
    }
    let mounts = spec.mounts().iter().flatten().map(kernels).collect();
    let translated = oci::for_guest(&spec, id, format!("{GUEST_SHARE}/{id}/{ROOTFS}"), mounts, false)?;
    Ok(CreateContainerRequest {
        container_id: id.to_string(),
        exec_id: id.to_string(),
        OCI: Some(translated.spec).into(),
        sandbox_pidns: translated.sandbox_pidns,
        stdin_port: NULL_STREAM_PORT,
        stderr_port: NULL_STREAM_PORT,
        ..CreateContainerRequest::default()
    })
}

/// A mount that needs no file of the host's, as all of the default specification are.
fn kernels(mount: &Mount) -> wire::Mount {
    wire::Mount {
        destination: mount.destination().to_string_lossy().into_owned(),
        source: mount.source().as_deref().unwrap_or(Path::new("")).to_string_lossy().into_owned(),
        type_: mount.typ().clone().unwrap_or_default(),
        options: mount.options().clone().unwrap_or_default(),
        ..wire::Mount::default()
    }
}

fn make_rootfs(place: &Path) -> io::Result<()> {
    let rootfs = place.join(ROOTFS);
    DirBuilder::new().recursive(true).mode(0o755).create(&rootfs)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o755).open(rootfs.join(PROGRAM))?;
    write_program(file)
}

/// A static program for x86_64 that writes [`OUTPUT`] and ends: the file's header (System V ABI, figure 4.3 of chapter 4), one
/// segment, and the code.
fn write_program(mut file: File) -> io::Result<()> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    const ENTRY: u64 = BASE + HEADERS;
    #[rustfmt::skip]
    const CODE: &[u8] = &[
        0x6a, OUTPUT,                   // push OUTPUT
        0x6a, 0x01, 0x58,               // rax = 1: write
        0x89, 0xc7,                     // edi = eax: standard output
        0x48, 0x89, 0xe6,               // rsi = rsp
        0x89, 0xc2,                     // edx = eax: a byte
        0x0f, 0x05,                     // syscall
        0x6a, 0x3c, 0x58,               // rax = 60: exit
        0x31, 0xff,                     // edi = 0
        0x0f, 0x05,                     // syscall
    ];
    const SIZE: u64 = HEADERS + CODE.len() as u64;
    let mut bytes = Vec::new();
    // e_ident: 64 bits, least significant byte first, version 1.
    bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // e_type ET_EXEC, e_machine EM_X86_64, e_version.
    bytes.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    bytes.extend(1_u32.to_le_bytes());
    // e_entry, e_phoff, e_shoff, e_flags.
    bytes.extend([ENTRY, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend(0_u32.to_le_bytes());
    // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx.
    bytes.extend([64_u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    // p_type PT_LOAD, p_flags R and X, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align.
    bytes.extend([1_u32, 5].iter().flat_map(|half| half.to_le_bytes()));
    bytes.extend([0, BASE, BASE, SIZE, SIZE, 0x1000].iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend(CODE);
    file.write_all(&bytes)
}

/// Removes what a rehearsal has left in the share.
pub fn clear(shared: &Path, name: &Id) -> io::Result<()> {
    match fs::remove_dir_all(shared.join(name.as_str())) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_program_writes_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        make_rootfs(dir.path()).unwrap();
        let output = Command::new(dir.path().join(ROOTFS).join(PROGRAM)).output().unwrap();
        assert!(output.status.success() && output.stdout == [OUTPUT], "{output:?}");
        make_rootfs(dir.path()).unwrap_err();
        let name = Id::try_from("default").unwrap();
        clear(dir.path(), &name).unwrap();
        make_rootfs(&dir.path().join("default")).unwrap();
        clear(dir.path(), &name).unwrap();
        assert!(!dir.path().join("default").exists());
    }

    #[test]
    fn the_container_needs_nothing_of_the_hosts() {
        let request = container_request(&Id::try_from("default").unwrap()).unwrap();
        assert_eq!(request.OCI.Root.Path, format!("{GUEST_SHARE}/default/{ROOTFS}"));
        assert_eq!(request.OCI.Process.Args, ["/program"]);
        let bound = request.OCI.Mounts.iter().find(|mount| mount.type_ == "bind" || mount.source.starts_with('/'));
        assert!(request.OCI.Mounts.len() > 3 && bound.is_none(), "{bound:?}");
    }
}
