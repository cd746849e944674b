//! The binary `inlay`, installed also as `containerd-shim-inlay-v2`.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let called_as_shim = std::env::args_os()
        .next()
        .and_then(|name| Some(Path::new(&name).file_name()?.to_str()?.starts_with("containerd-shim-")))
        .unwrap_or(false);
    if called_as_shim { inlay::shim() } else { inlay::operator() }
}
