//! A container, made by libcontainer from the bundle that the agent wrote.

use std::fs;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;

use super::entrypoint::{Entrypoint, FIRST_WORD};
use super::{CONFIG, CONSOLE_SOCKET, STATE_ROOT, chain};

/// How libcontainer goes on when its cleaning up after an error failed too.
const CLEANUP: &str = ". error during cleanup: ";

/// Makes the container in `directory`, whose last component is its id, up to the point where its first process waits
/// for the start. Answers that process's number.
pub fn create(directory: &Path) -> Result<i32, String> {
    let id = directory.file_name().and_then(|name| name.to_str()).ok_or("The container has no id")?;
    let terminal = fs::exists(directory.join(CONSOLE_SOCKET)).unwrap_or(false);
    debug_assert!(directory.join(CONFIG).exists());
    ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(Entrypoint)
        .with_root_path(STATE_ROOT)
        .map(|builder| builder.with_console_socket(terminal.then(|| directory.join(CONSOLE_SOCKET))))
        .and_then(|builder| builder.as_init(directory).with_systemd(false).with_detach(true).as_sibling(true).build())
        .map_err(|error| user_text(&chain(&error)))?
        .pid()
        .map(nix_pid)
        .ok_or_else(|| "The container has no first process".to_owned())
}

fn nix_pid(pid: impl Into<i32>) -> i32 {
    pid.into()
}

/// What libcontainer puts around an error that happened inside the container says nothing to a user: from the first
/// word of ours on, the text is the one that runc's users know. What it says about its own cleaning up is dropped; the
/// agent cleans up after it.
fn user_text(text: &str) -> String {
    let text = text.split_once(CLEANUP).map_or(text, |(cause, _)| cause);
    match text.find(FIRST_WORD) {
        Some(start) => text[start..].to_owned(),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_part_of_an_error_is_kept() {
        let text = r#"failed: exec process failed with error error in executing process : exec: "nope": not found"#;
        assert_eq!(user_text(text), r#"exec: "nope": not found"#);
        assert_eq!(user_text("failed to prepare rootfs"), "failed to prepare rootfs");
        assert_eq!(user_text(r#"a: exec: "x": gone. error during cleanup: b: c"#), r#"exec: "x": gone"#);
    }
}
