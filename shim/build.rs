//! How the program is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // A word for 63 addresses to relocate, not three for each: half a megabyte that no start has to read.
    // Wants a C library from 2.36 on, which is Debian 12's; the program that `make build` makes carries it.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
