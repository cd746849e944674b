//! What the shim says about itself.

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

/// Name under which containerd knows the runtime.
const RUNTIME_NAME: &str = "io.containerd.inlay.v2";

/// Name and version for `-v`.
pub fn version_text() -> String {
    format!("containerd-shim-inlay-v2 (Inlay) {}", env!("CARGO_PKG_VERSION"))
}

/// The message that containerd 2.x reads from `-info`.
pub fn runtime_info() -> Vec<u8> {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..RuntimeVersion::default() };
    let info = RuntimeInfo { name: RUNTIME_NAME.to_owned(), version: Some(version).into(), ..RuntimeInfo::default() };
    // Writing to memory fails for messages over 2 GiB only.
    info.write_to_bytes().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_info_names_the_runtime() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info()).unwrap();
        assert_eq!(info.name, RUNTIME_NAME);
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    }
}
