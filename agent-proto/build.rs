//! Generates messages, clients and servers from `protos/` with a parser written in Rust: no protoc needed.

use std::env;
use std::fs;
use std::path::PathBuf;

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTOS: [&str; 4] = ["protos/agent.proto", "protos/health.proto", "protos/oci.proto", "protos/types.proto"];

const MODULES: &str = "
pub mod agent;
pub mod agent_ttrpc;
pub mod health;
pub mod health_ttrpc;
pub mod oci;
pub mod types;
";

fn main() {
    println!("cargo:rerun-if-changed=protos");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    Codegen::new()
        .out_dir(&out)
        .include("protos")
        .inputs(PROTOS)
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false).lite_runtime(true))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("The agent's protos compile");
    // The generated files carry inner attributes, so they must be modules of their own and cannot be included.
    fs::write(out.join("modules.rs"), MODULES).expect("OUT_DIR is writable");
}
