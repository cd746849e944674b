//! A place for a target that lets an input name files.

use std::path::Path;

use landlock::{ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr};

/// The calling thread, and those that it starts, can change files below `place` and nowhere else, and beside it use the devices
/// that a machine is made of. A target must not run without that.
pub fn write_only_below(place: &Path) {
    let access = AccessFs::from_write(ABI::V2);
    let allow = |path: &Path, access| PathBeneath::new(PathFd::new(path).expect("A path"), access);
    let mut rules = Ruleset::default().handle_access(access).and_then(Ruleset::create).expect("Landlock");
    rules = rules.add_rule(allow(place, access)).expect("A rule");
    for device in ["/dev/kvm", "/dev/net/tun", "/dev/null"] {
        if Path::new(device).exists() {
            rules = rules.add_rule(allow(Path::new(device), AccessFs::WriteFile.into())).expect("A rule");
        }
    }
    let status = rules.restrict_self().expect("Landlock");
    assert_eq!(status.ruleset, landlock::RulesetStatus::FullyEnforced, "The host's kernel has Landlock");
}
