//! The last step into a container: finding the program and becoming it, with the error texts of runc.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::unistd::execve;
use oci_spec::runtime::{Process, Spec};

/// What every error of this module begins with.
pub const FIRST_WORD: &str = "exec: ";

/// libcontainer's way to call us.
#[derive(Clone)]
pub struct Entrypoint;

impl Executor for Entrypoint {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        process
            .ok_or_else(|| format!("{FIRST_WORD}no process is specified"))
            .and_then(find)
            .map(drop)
            .map_err(ExecutorValidationError::ArgValidationError)
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Some(process) = spec.process() else { return Err(ExecutorError::InvalidArg) };
        let Err(error) = become_program(process);
        // The container counts as started by now, so the only ones left to tell are its own standard error and, by
        // the exit code, whoever waits: as with runc.
        let _ = writeln!(std::io::stderr(), "{error}");
        std::process::exit(1);
    }
}

/// Replaces this process by the program that `process` names. Returns only an error.
pub fn become_program(process: &Process) -> Result<Infallible, String> {
    let program = find(process)?;
    let strings = |list: &Option<Vec<String>>| -> Result<Vec<CString>, String> {
        let each =
            |text: &String| CString::new(text.as_str()).map_err(|_| format!("{FIRST_WORD}{text:?} has a NUL in it"));
        list.iter().flatten().map(each).collect()
    };
    let args = strings(process.args())?;
    let env = strings(process.env())?;
    let path = CString::new(program.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())?;
    execve(&path, &args, &env).map_err(|errno| format!("{FIRST_WORD}{:?}: {}", program, sentence(errno)))
}

/// The file to execute, looked up as execvp(3) does: names without a slash in `PATH`, others as they are.
pub fn find(process: &Process) -> Result<PathBuf, String> {
    let name = process.args().iter().flatten().next().map_or("", String::as_str);
    if name.is_empty() {
        return Err(format!("{FIRST_WORD}no command is specified"));
    }
    if name.contains('/') {
        let path = Path::new(name);
        return match executable(path) {
            Ok(()) => Ok(path.to_owned()),
            Err(Errno::ENOENT) => Err(format!("{FIRST_WORD}{name:?}: stat {name}: {}", sentence(Errno::ENOENT))),
            Err(errno) => Err(format!("{FIRST_WORD}{name:?}: {}", sentence(errno))),
        };
    }
    let path_variable = process.env().iter().flatten().find_map(|entry| entry.strip_prefix("PATH="));
    let mut denied = false;
    for directory in path_variable.unwrap_or_default().split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    let reason = if denied { sentence(Errno::EACCES) } else { "executable file not found in $PATH" };
    Err(format!("{FIRST_WORD}{name:?}: {reason}"))
}

fn executable(path: &Path) -> Result<(), Errno> {
    let metadata = fs::metadata(path).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    Ok(())
}

/// The words that Go's runtime, and so runc, uses.
fn sentence(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOENT => "no such file or directory",
        Errno::EACCES => "permission denied",
        Errno::EISDIR => "is a directory",
        Errno::ENOEXEC => "exec format error",
        Errno::ENOTDIR => "not a directory",
        Errno::ELOOP => "too many levels of symbolic links",
        Errno::ETXTBSY => "text file busy",
        Errno::E2BIG => "argument list too long",
        other => other.desc(),
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::ProcessBuilder;

    use super::*;

    fn process(args: &[&str], path: &str) -> Process {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        ProcessBuilder::default().args(args).env(vec![format!("PATH={path}")]).cwd("/").build().expect("A process")
    }

    #[test]
    fn programs_are_found_in_path_or_where_they_are() {
        assert_eq!(find(&process(&["sh"], "/nowhere:/bin")), Ok(PathBuf::from("/bin/sh")));
        assert_eq!(find(&process(&["/bin/sh"], "")), Ok(PathBuf::from("/bin/sh")));
    }

    #[test]
    fn errors_are_worded_as_users_know_them() {
        let text = |args: &[&str]| find(&process(args, "/bin")).expect_err("Not there");
        assert_eq!(text(&["nope"]), r#"exec: "nope": executable file not found in $PATH"#);
        assert_eq!(text(&["/nope"]), r#"exec: "/nope": stat /nope: no such file or directory"#);
        assert_eq!(text(&["/etc"]), r#"exec: "/etc": is a directory"#);
        assert_eq!(text(&["/etc/passwd"]), r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(text(&[]), "exec: no command is specified");
        assert_eq!(text(&[""]), "exec: no command is specified");
    }

    #[test]
    fn a_file_that_may_not_run_hides_no_later_one() {
        let directory = tempfile::tempdir().expect("A directory");
        fs::write(directory.path().join("sh"), "").expect("A file");
        let path = format!("{}:/bin", directory.path().display());
        assert_eq!(find(&process(&["sh"], &path)), Ok(PathBuf::from("/bin/sh")));
        let path = directory.path().display().to_string();
        assert_eq!(find(&process(&["sh"], &path)), Err(r#"exec: "sh": permission denied"#.into()));
    }
}
