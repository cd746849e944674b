//! What no file allows ends the process, and says which call it was and whose. Each case runs in a process of its own:
//! this test, started again for one case alone.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::process::{Command, Output};
use std::ptr;

use seccomp::{
    Confinement, EXIT_CODE, Post, Role, confine_helper, confine_machine, confine_process, drop_capabilities,
    drop_privileges, spawn, take_role,
};

const CASE: &str = "SECCOMP_TEST_CASE";
/// Memory of nobody else, of no file.
const LIKE_A_HEAP: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

/// Runs `body` in a thread of `role` in a child process.
fn in_child(test: &str, body: impl FnOnce()) -> Option<Output> {
    if std::env::var(CASE).as_deref() == Ok(test) {
        body();
        println!("went on");
        return None;
    }
    let program = std::env::current_exe().expect("own path");
    let child = Command::new(program).args(["--exact", "--nocapture", test]).env(CASE, test).output();
    Some(child.expect("child"))
}

fn in_role(role: Role, body: impl FnOnce() + Send + 'static) {
    spawn(Confinement::On, role, "confined".to_owned(), body).expect("thread").join().expect("joined");
}

#[track_caller]
fn is_named(output: Option<Output>, words: &str) {
    let Some(output) = output else { return };
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(EXIT_CODE), "{output:?}");
    assert!(told.contains(&format!("seccomp: the thread role {words}")), "{told}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("went on"));
}

#[track_caller]
fn goes_on(output: Option<Output>) {
    let Some(output) = output else { return };
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("went on"), "{output:?}");
}

fn call(number: libc::c_long, arguments: [libc::c_long; 3]) {
    let [first, second, third] = arguments;
    // SAFETY: the calls that the tests make are refused before they read any memory.
    let _ = unsafe { libc::syscall(number, first, second, third) };
}

#[test]
fn a_processor_starts_no_program() {
    let body = || in_role(Role::Vcpu, || call(libc::SYS_execve, [0x10, 0x20, 0]));
    is_named(in_child("a_processor_starts_no_program", body), "vcpu may not call execve(0x10, 0x20, 0x0");
}

/// Version of Landlock that this kernel has; 0 without any.
fn landlock() -> i64 {
    // SAFETY: asks for a version, and reads no memory.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) }.max(0)
}

/// Gives the file `from` in the directory `of` the name `to` in `at`, as the file system server does, which has no shorter call.
fn moves(of: &File, from: &CStr, at: &File, to: &CStr) -> io::Result<()> {
    // SAFETY: two strings that end.
    match unsafe { libc::renameat(of.as_raw_fd(), from.as_ptr(), at.as_raw_fd(), to.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn a_file_system_server_opens_what_is_below_its_directory_alone() {
    let body = || {
        let (own, other) = (tempfile::tempdir().expect("own"), tempfile::tempdir().expect("other"));
        let [from, to] = ["from", "to"].map(|name| {
            std::fs::create_dir(own.path().join(name)).expect("directory");
            File::open(own.path().join(name)).expect("opened")
        });
        let (inside, outside) = (own.path().join("from/file"), other.path().join("file"));
        std::fs::write(&outside, "not for guests").expect("written");
        let root = File::open(own.path()).expect("opened");
        // Linux 5.19 is the first whose Landlock is used for this.
        let closed = landlock() >= 2;
        let thread = spawn(Confinement::On, Post::serving(root.into()), "fs".to_owned(), move || {
            File::create(&inside).expect("below its directory");
            moves(&from, c"file", &to, c"moved").expect("to another directory of its own");
            if closed {
                for result in [File::open(&outside), File::create(&outside), File::open("/proc/self/status")] {
                    assert_eq!(result.expect_err("outside").kind(), io::ErrorKind::PermissionDenied);
                }
            }
        });
        thread.expect("thread").join().expect("joined");
        assert!(own.path().join("to/moved").exists());
        assert_eq!(std::fs::read_to_string(other.path().join("file")).expect("read"), "not for guests");
    };
    goes_on(in_child("a_file_system_server_opens_what_is_below_its_directory_alone", body));
}

#[test]
fn a_machines_process_moves_files_to_other_directories() {
    let body = || {
        let dir = tempfile::tempdir().expect("directory");
        let [from, to] = ["from", "to"].map(|name| {
            std::fs::create_dir(dir.path().join(name)).expect("directory");
            File::open(dir.path().join(name)).expect("opened")
        });
        std::fs::write(dir.path().join("from/file"), "").expect("written");
        confine_machine().expect("confined");
        moves(&from, c"file", &to, c"moved").expect("moved");
        std::fs::remove_file(dir.path().join("to/moved")).expect("it is there");
    };
    goes_on(in_child("a_machines_process_moves_files_to_other_directories", body));
}

#[test]
fn a_thread_that_uses_memory_which_is_not_there_is_named() {
    let test = "a_thread_that_uses_memory_which_is_not_there_is_named";
    let body = || {
        in_role(Role::Io, || {
            // SAFETY: the kernel chooses the place; nothing else is there, and nobody may touch it.
            let nothing = unsafe { libc::mmap(ptr::null_mut(), 4096, libc::PROT_NONE, LIKE_A_HEAP, -1, 0) };
            // SAFETY: none: it ends the process, which is what this test is about.
            unsafe { nothing.cast::<u8>().write_volatile(1) };
        });
    };
    let Some(output) = in_child(test, body) else { return };
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(128 + libc::SIGSEGV), "{output:?}");
    assert!(told.contains("seccomp: the thread role io has met SIGSEGV"), "{told}");
}

#[test]
fn a_device_loop_opens_no_file() {
    let body = || in_role(Role::Io, || drop(File::open("/etc/hostname")));
    is_named(in_child("a_device_loop_opens_no_file", body), "io may not call openat(");
}

#[test]
fn a_file_system_server_makes_no_socket() {
    let body = || in_role(Role::Fs, || call(libc::SYS_socket, [1, 1, 0]));
    is_named(in_child("a_file_system_server_makes_no_socket", body), "fs may not call socket(0x1, 0x1, 0x0");
}

#[test]
fn a_service_thread_traces_nobody() {
    let body = || in_role(Role::Api, || call(libc::SYS_ptrace, [0, 1, 0]));
    is_named(in_child("a_service_thread_traces_nobody", body), "api may not call ptrace(0x0, 0x1");
}

#[test]
fn only_the_guest_is_a_processors_ioctl() {
    const KVM_CREATE_VM: libc::c_long = 0xae01;
    let body = || in_role(Role::Vcpu, || call(libc::SYS_ioctl, [-1, KVM_CREATE_VM, 0]));
    is_named(
        in_child("only_the_guest_is_a_processors_ioctl", body),
        "vcpu may not call ioctl(0xffffffffffffffff, 0xae01",
    );
}

#[test]
fn no_memory_becomes_executable() {
    let protection = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let body = move || in_role(Role::Io, move || call(libc::SYS_mprotect, [0, 4096, protection]));
    is_named(in_child("no_memory_becomes_executable", body), "io may not call mprotect(0x0, 0x1000, 0x5");
}

#[test]
fn a_socket_is_of_this_host() {
    let body = || in_role(Role::Io, || call(libc::SYS_socket, [i64::from(libc::AF_INET), 1, 0]));
    is_named(in_child("a_socket_is_of_this_host", body), "io may not call socket(0x2");
}

#[test]
fn a_new_process_is_no_thread() {
    let body = || in_role(Role::Vcpu, || call(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0]));
    is_named(in_child("a_new_process_is_no_thread", body), "vcpu may not call clone(0x11");
}

#[test]
fn a_thread_may_start_a_thread() {
    // With the C library's own call for that, which a filter cannot look into.
    let body = || {
        in_role(Role::Io, || std::thread::spawn(|| drop(Box::new(1))).join().expect("joined"));
        in_role(Role::Vcpu, || {
            call(libc::SYS_clone3, [0, 0, 0]);
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS));
        });
    };
    goes_on(in_child("a_thread_may_start_a_thread", body));
}

#[test]
fn the_process_mounts_nothing_in_any_thread() {
    let body = || {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let early = std::thread::spawn(move || {
            wait.recv().expect("told");
            call(libc::SYS_mount, [0, 0, 0]);
        });
        confine_process(Confinement::On).expect("confined");
        go.send(()).expect("heard");
        drop(early.join());
    };
    is_named(in_child("the_process_mounts_nothing_in_any_thread", body), "ceiling may not call mount(");
}

#[test]
fn a_role_fits_under_the_ceiling() {
    let body = || {
        drop_privileges().expect("dropped");
        confine_process(Confinement::On).expect("confined");
        for role in [Role::Api, Role::Io, Role::Vcpu, Role::Fs] {
            in_role(role, || drop(vec![0; 1 << 20]));
        }
    };
    goes_on(in_child("a_role_fits_under_the_ceiling", body));
}

#[test]
fn a_machines_process_starts_no_program() {
    let body = || {
        confine_machine().expect("confined");
        call(libc::SYS_execve, [0x10, 0x20, 0]);
    };
    is_named(in_child("a_machines_process_starts_no_program", body), "ceiling may not call execve(");
}

#[test]
fn a_machines_process_runs_no_file_and_has_no_capabilities_but_for_files() {
    let body = || {
        let directory = std::env::temp_dir().join(format!("inlay-node-{}", std::process::id()));
        let closed = landlock() >= 2;
        confine_machine().expect("confined");
        // The ceiling allows both calls for the file system server, and Landlock, where the kernel has it, the first alone.
        let path = std::ffi::CString::new(directory.as_os_str().as_encoded_bytes()).expect("a path");
        // SAFETY: two strings that end.
        let linked = unsafe { libc::symlinkat(c"x".as_ptr(), libc::AT_FDCWD, path.as_ptr()) } == 0;
        std::fs::remove_file(&directory).expect("the link");
        // SAFETY: a string that ends. Device 1, 3 is the null device.
        let device =
            unsafe { libc::mknodat(libc::AT_FDCWD, path.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 3)) } == 0;
        let _ = std::fs::remove_file(&directory);
        assert!(linked);
        assert!(!(closed && device));
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("status");
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).expect(name).trim().to_owned();
        assert_eq!((field("NoNewPrivs:").as_str(), field("Seccomp:").as_str()), ("1", "2"));
        // Bits 0 to 7 and 27 and 31 are of files (linux/capability.h).
        let effective = u64::from_str_radix(&field("CapEff:"), 16).expect("capabilities");
        assert_eq!(effective & !0x8800_00ff, 0, "{effective:#x}");
    };
    goes_on(in_child("a_machines_process_runs_no_file_and_has_no_capabilities_but_for_files", body));
}

#[test]
fn a_daemon_lets_go_of_its_standard_streams_and_of_no_other() {
    let test = "a_daemon_lets_go_of_its_standard_streams_and_of_no_other";
    let body = || {
        confine_machine().expect("confined");
        call(libc::SYS_dup2, [2, 0, 0]);
        call(libc::SYS_dup2, [2, 7, 0]);
    };
    is_named(in_child(test, body), "ceiling may not call dup2(0x2, 0x7");
}

#[test]
fn the_ceiling_comes_before_the_roles() {
    let body = || {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = spawn(Confinement::On, Role::Io, "io".to_owned(), move || {
            let _ = wait.recv();
        })
        .expect("thread");
        let error = confine_process(Confinement::On).expect_err("too late");
        assert!(error.to_string().contains("which has a filter of its own"), "{error}");
        drop(go);
        thread.join().expect("joined");
    };
    goes_on(in_child("the_ceiling_comes_before_the_roles", body));
}

#[test]
fn a_processor_has_no_capabilities_and_gains_none() {
    let body = || {
        let (tell, told) = std::sync::mpsc::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = spawn(Confinement::On, Role::Vcpu, "vcpu".to_owned(), move || {
            // SAFETY: a plain call without memory.
            let _ = tell.send(unsafe { libc::gettid() });
            let _ = wait.recv();
        })
        .expect("thread");
        let path = format!("/proc/self/task/{}/status", told.recv().expect("told"));
        let status = std::fs::read_to_string(path).expect("status");
        for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
            assert!(status.contains(line), "{line} in {status}");
        }
        drop(go);
        thread.join().expect("joined");
    };
    goes_on(in_child("a_processor_has_no_capabilities_and_gains_none", body));
}

#[test]
fn without_confinement_a_thread_is_like_any_other() {
    let body = || {
        let thread =
            spawn(Confinement::Off, Role::Vcpu, "vcpu".to_owned(), || drop(File::open("/etc/passwd").expect("open")));
        thread.expect("thread").join().expect("joined");
    };
    goes_on(in_child("without_confinement_a_thread_is_like_any_other", body));
}

#[test]
fn a_helper_starts_programs_and_is_refused_the_rest() {
    let body = || {
        if let Err(error) = confine_helper() {
            assert!(error.to_string().contains("helper"), "{error}");
            println!("went on, but nothing was tested: the helper's filter needs CAP_SYS_ADMIN");
            return;
        }
        assert!(Command::new("/bin/true").status().expect("started").success());
        call(libc::SYS_ptrace, [0, 1, 0]);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EPERM));
        // CAP_SYS_MODULE is bit 16, CAP_SYS_PTRACE 19, CAP_SYS_BOOT 22 (linux/capability.h).
        let gone = 1 << 16 | 1 << 19 | 1 << 22;
        assert_eq!(effective_capabilities() & gone, 0);
    };
    goes_on(in_child("a_helper_starts_programs_and_is_refused_the_rest", body));
}

fn effective_capabilities() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("status");
    let kept = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).expect("line");
    u64::from_str_radix(kept, 16).expect("hexadecimal")
}

#[test]
fn threads_that_were_there_take_their_role_below_the_ceiling() {
    let body = || {
        drop_privileges().expect("dropped");
        let service = std::thread::spawn(|| {
            drop_capabilities().expect("dropped");
            assert_eq!(effective_capabilities(), 0);
            // Twice, as after a start that failed.
            for _ in 0..2 {
                confine_process(Confinement::On).expect("confined");
                take_role(Confinement::On, Role::Api).expect("confined");
            }
            // A thread that it starts is confined like it, whoever starts it.
            std::thread::spawn(|| drop(File::open("/etc/passwd").expect("open"))).join().expect("joined");
        });
        service.join().expect("joined");
        // The other thread of the process is under the ceiling alone.
        in_role(Role::Io, || drop(vec![0; 1 << 20]));
    };
    goes_on(in_child("threads_that_were_there_take_their_role_below_the_ceiling", body));
}

#[test]
fn a_service_thread_may_not_look_into_a_machine() {
    const KVM_GET_API_VERSION: libc::c_long = 0xae00;
    let body = || {
        confine_process(Confinement::On).expect("confined");
        take_role(Confinement::On, Role::Api).expect("confined");
        call(libc::SYS_ioctl, [-1, KVM_GET_API_VERSION, 0]);
    };
    is_named(
        in_child("a_service_thread_may_not_look_into_a_machine", body),
        "api may not call ioctl(0xffffffffffffffff, 0xae00",
    );
}
