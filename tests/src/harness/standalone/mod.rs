//! Machines without containers: the release binary called `stratovirt`, our guest kernel, and a guest of a shell and tools
//! (`guest/tools`) that does what a test says.
//!
//! ```no_run
//! use inlay_tests::harness::standalone::{self, Rig};
//!
//! standalone::play(|rig: &Rig| {
//!     let disk = rig.file("disk", 16 << 20);
//!     let vm = rig
//!         .vm()
//!         .cpus(2)
//!         .option("-drive", format!("id=d,file={}", disk.display()))
//!         .option("-device", "virtio-blk-device,id=d,drive=d")
//!         .boot();
//!     assert_eq!(vm.sh("cat /sys/block/vda/size").trim(), "32768");
//!     let load = vm.spawn("md5sum /dev/vda");
//!     vm.qmp("stop", serde_json::json!({}));
//!     vm.qmp("cont", serde_json::json!({}));
//!     println!("{} {}", vm.join(load), vm.pid());
//! });
//! ```
//!
//! What a guest does not answer in time, a command that fails and a QMP error end the test, and then the machine's console
//! and log are shown.

mod console;
mod order;
mod qmp;
mod rig;
mod vm;
pub mod vsock;

pub use console::Said;
pub use order::Order;
pub use rig::{Rig, host, md5, noise, play};
pub use vm::{Job, Vm};
