//! Machines with a Linux guest and no containers: every device, driven by the command line, QMP and the console.

mod directories;
mod drives;
mod fronts;
mod life;
mod memory;
mod network;
