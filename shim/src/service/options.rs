//! The runtime options that containerd attaches to a create request.
//!
//! `runtimeoptions.v1.Options` has three text fields: `type_url` 1, `config_path` 2, `config_body` 3. Two of them are
//! read here by hand, which spares a generated module.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedInputStream, Result};

const TYPE_NAME: &str = "runtimeoptions.v1.Options";
const CONFIG_PATH: u32 = 2;
/// Wire type of texts (protobuf's encoding guide).
const LENGTH_DELIMITED: u32 = 2;

/// The configuration file that the options name. Options of another runtime, such as runc's, name none.
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>> {
    let Some(options) = options.filter(|options| options.type_url.ends_with(TYPE_NAME)) else { return Ok(None) };
    let mut input = CodedInputStream::from_bytes(&options.value);
    let mut path = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        if tag == CONFIG_PATH << 3 | LENGTH_DELIMITED {
            path = Some(input.read_string()?).filter(|path| !path.is_empty()).map(PathBuf::from);
        } else {
            containerd_shim_protos::protobuf::rt::skip_field_for_tag(tag, &mut input)?;
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(value: &[u8]) -> Any {
        Any { type_url: TYPE_NAME.to_owned(), value: value.to_owned(), ..Any::default() }
    }

    #[test]
    fn the_path_is_found_between_other_fields() {
        let bytes = b"\x0a\x01t\x12\x05/conf\x1a\x01b";
        assert_eq!(config_path(Some(&options(bytes))).unwrap(), Some("/conf".into()));
        assert_eq!(config_path(Some(&options(b""))).unwrap(), None);
        assert_eq!(config_path(None).unwrap(), None);
        let runc = Any { type_url: "containerd.runc.v1.Options".to_owned(), ..options(bytes) };
        assert_eq!(config_path(Some(&runc)).unwrap(), None);
        assert!(config_path(Some(&options(b"\x12\x05/c"))).is_err());
    }
}
