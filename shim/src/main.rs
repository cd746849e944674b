//! The binary `inlay`, installed also as `containerd-shim-inlay-v2` and `stratovirt`.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let called = std::env::args_os().next().unwrap_or_default();
    match Path::new(&called).file_name().and_then(|name| name.to_str()) {
        Some(name) if name.starts_with("containerd-shim-") => inlay::shim(),
        Some("stratovirt") => inlay::stratovirt(),
        _ => inlay::operator(),
    }
}
