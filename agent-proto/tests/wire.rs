//! The wire contract: every message, field number and type of the golden table against the proto files that the code is
//! generated from, and the bytes of a few messages against the code.

use std::collections::BTreeSet;

use agent_proto::{agent, health, oci, types};
use protobuf::descriptor::field_descriptor_proto::{Label, Type};
use protobuf::descriptor::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto};
use protobuf::{Message, MessageField};

const TABLE: &str = include_str!("golden/fields.tsv");

/// One row of the table: (kind, package, message or service, name, number, type).
type Row = [String; 6];

fn row(kind: &str, package: &str, owner: &str, name: &str, number: &str, ty: &str) -> Row {
    [kind, package, owner, name, number, ty].map(str::to_owned)
}

fn golden() -> BTreeSet<Row> {
    TABLE
        .lines()
        .skip(1)
        .map(|line| {
            let mut cells = line.split('\t');
            std::array::from_fn(|_| cells.next().unwrap_or_default().to_owned())
        })
        .collect()
}

/// The name as the table spells it: the last component, with a foreign package kept.
fn short(full: &str, package: &str) -> String {
    let full = full.trim_start_matches('.');
    match full.strip_prefix(package).and_then(|rest| rest.strip_prefix('.')) {
        Some(local) => local.rsplit('.').next().unwrap_or(local).to_owned(),
        None => full.to_owned(),
    }
}

fn scalar(field: &FieldDescriptorProto, package: &str) -> String {
    match field.type_() {
        Type::TYPE_STRING => "string".into(),
        Type::TYPE_BYTES => "bytes".into(),
        Type::TYPE_BOOL => "bool".into(),
        Type::TYPE_INT32 => "int32".into(),
        Type::TYPE_INT64 => "int64".into(),
        Type::TYPE_UINT32 => "uint32".into(),
        Type::TYPE_UINT64 => "uint64".into(),
        Type::TYPE_MESSAGE | Type::TYPE_ENUM => short(field.type_name(), package),
        other => panic!("The table has no name for {other:?}"),
    }
}

fn field_type(field: &FieldDescriptorProto, message: &DescriptorProto, package: &str) -> String {
    let base = scalar(field, package);
    let map_entry = message.nested_type.iter().find(|nested| nested.options.map_entry() && nested.name() == base);
    if let Some(entry) = map_entry {
        return format!("map<{},{}>", scalar(&entry.field[0], package), scalar(&entry.field[1], package));
    }
    if field.label() == Label::LABEL_REPEATED {
        return format!("repeated {base}");
    }
    if field.proto3_optional() {
        return format!("optional{base}");
    }
    match usize::try_from(field.oneof_index()) {
        Ok(index) if field.has_oneof_index() => {
            format!("{base} (oneof {})", message.oneof_decl[index].name())
        }
        _ => base,
    }
}

fn enum_rows(package: &str, owner: &str, desc: &protobuf::descriptor::EnumDescriptorProto, rows: &mut BTreeSet<Row>) {
    for value in &desc.value {
        rows.insert(row("enum", package, owner, value.name(), &value.number().to_string(), ""));
    }
}

fn rows_of(file: &FileDescriptorProto) -> BTreeSet<Row> {
    let package = file.package();
    let mut rows = BTreeSet::new();
    for service in &file.service {
        for method in &service.method {
            let ty = format!("{} -> {}", short(method.input_type(), package), short(method.output_type(), package));
            rows.insert(row("rpc", package, service.name(), method.name(), "", &ty));
        }
    }
    for desc in &file.enum_type {
        enum_rows(package, desc.name(), desc, &mut rows);
    }
    for message in &file.message_type {
        for desc in &message.enum_type {
            enum_rows(package, &format!("{}.{}", message.name(), desc.name()), desc, &mut rows);
        }
        for field in &message.field {
            let ty = field_type(field, message, package);
            rows.insert(row("field", package, message.name(), field.name(), &field.number().to_string(), &ty));
        }
    }
    rows
}

#[test]
fn descriptors_are_the_golden_table() {
    // Parsed again: the generated code carries no descriptors.
    let parsed = protobuf_parse::Parser::new()
        .pure()
        .include("protos")
        .inputs(["protos/agent.proto", "protos/health.proto", "protos/oci.proto", "protos/types.proto"])
        .parse_and_typecheck()
        .expect("The protos are valid");
    let files = parsed.file_descriptors.iter().filter(|file| !file.package().starts_with("google"));
    let ours: BTreeSet<Row> = files.flat_map(rows_of).collect();
    let golden = golden();
    let missing: Vec<_> = golden.difference(&ours).collect();
    let extra: Vec<_> = ours.difference(&golden).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing: {missing:#?}\nextra: {extra:#?}");
    assert!(ours.len() > 400, "The table was read: {} rows", ours.len());
}

#[track_caller]
fn assert_bytes<M: Message + PartialEq + std::fmt::Debug>(message: &M, hex: &str) {
    let bytes = message.write_to_bytes().expect("The message is complete");
    let seen: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(seen, hex);
    assert_eq!(&M::parse_from_bytes(&bytes).expect("The bytes parse"), message);
}

#[test]
fn bytes_of_a_signal() {
    let request = agent::SignalProcessRequest { container_id: "c1".into(), signal: 9, ..Default::default() };
    assert_bytes(&request, "0a0263311809");
}

#[test]
fn bytes_of_a_stdio_port() {
    let request = agent::CreateContainerRequest {
        container_id: "c".into(),
        OCI: MessageField::some(oci::Spec { Version: "1".into(), ..Default::default() }),
        sandbox_pidns: true,
        stdin_port: 1,
        stdout_port: 300,
        stderr_port: 0xffff_ffff,
        ..Default::default()
    };
    assert_bytes(&request, "0a016332030a01313801480150ac0258ffffffff0f");
}

#[test]
fn bytes_of_negative_and_packed_numbers() {
    let memory = oci::LinuxMemory { Limit: -1, ..Default::default() };
    assert_bytes(&memory, "08ffffffffffffffffff01");
    let user = oci::User { UID: 1, AdditionalGids: vec![1, 200], ..Default::default() };
    assert_bytes(&user, "08011a0301c801");
}

#[test]
fn bytes_of_a_map_an_enum_and_a_oneof() {
    let spec = oci::Spec { Annotations: [("a".to_owned(), "b".to_owned())].into(), ..Default::default() };
    assert_bytes(&spec, "3a060a0161120162");
    let health = health::HealthCheckResponse {
        status: health::health_check_response::ServingStatus::SERVING.into(),
        ..Default::default()
    };
    assert_bytes(&health, "0801");
    let mut call = oci::LinuxSyscall { Names: vec!["mkdir".into()], ..Default::default() };
    call.set_errnoret(0);
    assert_bytes(&call, "0a056d6b6469721800");
    assert!(call.has_errnoret(), "A zero in a oneof travels");
}

#[test]
fn an_optional_that_is_set_to_its_default_travels() {
    let config = agent::MemAgentMemcgConfig { disabled: Some(false), ..Default::default() };
    assert_bytes(&config, "0800");
}

#[test]
fn unknown_fields_survive() {
    let mut bytes = types::Interface { mtu: 1500, ..Default::default() }.write_to_bytes().expect("complete");
    bytes.extend_from_slice(&[0x7a, 0x01, 0x78]);
    let parsed = types::Interface::parse_from_bytes(&bytes).expect("A field of a newer peer is no error");
    assert_eq!(parsed.mtu, 1500);
    assert_eq!(parsed.write_to_bytes().expect("complete"), bytes);
}
