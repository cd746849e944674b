//! Overlay mounts with many layers.
//!
//! mount(2) takes at most one page of options. Every layer adds the path of its snapshot, so images of some forty
//! layers pass that. The paths share their directory: with it as working directory, each needs its last parts only.

use std::path::{Path, PathBuf};

/// Bytes that mount(2) reads of its options, a terminating zero included.
pub const MAX_OPTIONS: usize = 4096;

const LOWER: &str = "lowerdir=";

/// Options that fit, and the directory that their relative paths start from.
#[derive(Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Working directory for the mount.
    pub directory: PathBuf,
    /// The options.
    pub options: Vec<String>,
}

/// Shortens `options` when they are too long; `None` when they fit as they are or cannot be shortened.
pub fn compact(options: &[String]) -> Option<Compacted> {
    if length(options) < MAX_OPTIONS {
        return None;
    }
    let position = options.iter().position(|option| option.starts_with(LOWER))?;
    let layers: Vec<&Path> = options.get(position)?.strip_prefix(LOWER)?.split(':').map(Path::new).collect();
    let directory = common_directory(&layers)?;
    let relative: Option<Vec<&str>> =
        layers.iter().map(|layer| layer.strip_prefix(&directory).ok()?.to_str()).collect();
    let mut options = options.to_vec();
    *options.get_mut(position)? = format!("{LOWER}{}", relative?.join(":"));
    Some(Compacted { directory, options })
}

/// Length of the options as mount(2) gets them, without the terminating zero.
pub fn length(options: &[String]) -> usize {
    options.iter().map(|option| option.len() + 1).sum::<usize>().saturating_sub(1)
}

/// The deepest directory that holds all of `paths`; none when a path is relative or they share the root alone.
fn common_directory(paths: &[&Path]) -> Option<PathBuf> {
    let (first, rest) = paths.split_first()?;
    let mut common = first.parent()?;
    while !rest.iter().all(|path| path.starts_with(common) && *path != common) {
        common = common.parent()?;
    }
    (common.is_absolute() && common != Path::new("/")).then(|| common.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOTS: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";

    fn with_layers(count: usize) -> Vec<String> {
        let layers: Vec<String> = (1..=count).map(|n| format!("{SNAPSHOTS}/{n}/fs")).collect();
        vec![
            "index=off".to_owned(),
            format!("workdir={SNAPSHOTS}/999/work"),
            format!("upperdir={SNAPSHOTS}/999/fs"),
            format!("{LOWER}{}", layers.join(":")),
        ]
    }

    #[test]
    fn a_few_layers_stay_as_they_are() {
        assert_eq!(compact(&with_layers(5)), None);
    }

    #[test]
    fn many_layers_are_named_from_their_common_directory() {
        let long = with_layers(120);
        assert!(length(&long) >= MAX_OPTIONS);
        let compacted = compact(&long).unwrap();
        assert_eq!(compacted.directory, Path::new(SNAPSHOTS));
        assert!(length(&compacted.options) < MAX_OPTIONS);
        assert_eq!(compacted.options[..3], long[..3]);
        assert!(compacted.options[3].starts_with("lowerdir=1/fs:2/fs:3/fs:"));
        assert!(compacted.options[3].ends_with(":119/fs:120/fs"));
    }

    #[test]
    fn the_limit_is_a_page_with_its_zero() {
        let padded = |length: usize| vec![format!("{LOWER}{}", format_args!("/a/b:/a/{}", "c".repeat(length - 17)))];
        assert_eq!(length(&padded(MAX_OPTIONS - 1)), MAX_OPTIONS - 1);
        assert_eq!(compact(&padded(MAX_OPTIONS - 1)), None);
        assert_eq!(compact(&padded(MAX_OPTIONS)).unwrap().directory, Path::new("/a"));
    }

    #[test]
    fn layers_without_a_common_directory_are_left_alone() {
        let long = |path: &str| vec![format!("{LOWER}{path}/{}", "x".repeat(MAX_OPTIONS))];
        assert_eq!(compact(&long("/a/b:/c")), None);
        assert_eq!(compact(&long("relative:/c")), None);
        assert_eq!(compact(&["x".repeat(MAX_OPTIONS)]), None);
    }

    #[test]
    fn a_layer_inside_another_keeps_a_name() {
        // "/s/a" is itself a layer, so the directory must be above it.
        let paths = [Path::new("/s/a"), Path::new("/s/a/b")];
        assert_eq!(common_directory(&paths), Some(PathBuf::from("/s")));
    }
}
