//! Guests whose root is an image on a drive instead of an initrd.

use std::fs;
use std::path::{Path, PathBuf};

use inlay_tests::harness::trace::Start;
use inlay_tests::harness::{HOME, Parts, Scene, configure};
use inlay_tests::images;

crate::for_inlay!(
    boots_from_an_image,
    restores_a_guest_that_has_booted_from_an_image,
    names_an_image_that_is_not_there,
    shows_the_console_where_an_image_is_no_file_system,
    refuses_an_initrd_beside_an_image,
);

const TEMPLATE: &str = "default";

fn with_image(scene: &Scene, image: PathBuf, extra: &str) {
    let parts = Parts { image, ..scene.parts.clone() };
    configure(&format!("{}{extra}", parts.configuration_of_image(""))).unwrap();
}

fn kernel_log(scene: &Scene) -> String {
    scene.run_with(&["--privileged"], images::BUSYBOX, &["dmesg"]).ok().stdout
}

#[track_caller]
fn has_mounted_its_drive(log: &str) {
    assert!(log.contains("erofs: (device vda): mounted"), "{log}");
    assert!(log.contains("VFS: Mounted root (erofs filesystem) readonly"), "{log}");
}

fn boots_from_an_image(scene: &Scene) {
    with_image(scene, scene.parts.image.clone(), "");
    has_mounted_its_drive(&kernel_log(scene));
    let id = scene.start(&["sleep", "1000"]);
    assert_eq!(scene.exec(&id, &["hostname"]).ok().stdout.trim(), id);
    // The drive is the guest's own, and no container's.
    assert_eq!(scene.exec(&id, &["ls", "/dev/vda"]).status.code(), Some(1));
    scene.remove(&id);
}

fn restores_a_guest_that_has_booted_from_an_image(scene: &Scene) {
    let image = Path::new(HOME).join("guest.img");
    fs::copy(&scene.parts.image, &image).unwrap();
    with_image(scene, image.clone(), "[factory]\nenable_template = true\n");
    scene.inlay(&["template", "create", TEMPLATE]).ok();
    let shown = scene.inlay(&["template", "show", TEMPLATE]).ok().stdout;
    assert!(shown.contains(image.to_str().unwrap()) && shown.contains("fits       yes"), "{shown}");

    let trace = Path::new(HOME).join("trace.jsonl");
    let _ = fs::remove_file(&trace);
    has_mounted_its_drive(&kernel_log(scene));
    assert_eq!(scene.run(&["sh", "-c", "exit 7"]).status.code(), Some(7));
    let starts = Start::read(&trace).unwrap();
    assert!(!starts.is_empty() && starts.iter().all(|start| start.restored), "{starts:?}");

    // Another image is another guest.
    let mut content = fs::read(&image).unwrap();
    content.extend([0; 4096]);
    fs::remove_file(&image).unwrap();
    fs::write(&image, content).unwrap();
    let shown = scene.inlay(&["template", "show", TEMPLATE]).ok().stdout;
    assert!(shown.contains("fits       no: ") && shown.contains("its image is "), "{shown}");
    scene.inlay(&["template", "remove", TEMPLATE]).ok();
    fs::remove_file(&image).unwrap();
}

fn names_an_image_that_is_not_there(scene: &Scene) {
    with_image(scene, "/no/such/image".into(), "");
    let output = scene.run(&["true"]).failed();
    assert!(output.stderr.contains("Cannot open the guest's image /no/such/image"), "{output:?}");
    assert!(output.stderr.contains("No such file or directory"), "{output:?}");
}

fn shows_the_console_where_an_image_is_no_file_system(scene: &Scene) {
    let image = Path::new(HOME).join("zeros.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    with_image(scene, image.clone(), "");
    let output = scene.run(&["true"]).failed();
    fs::remove_file(&image).unwrap();
    assert!(output.stderr.contains("The guest's kernel has panicked: VFS: Unable to mount root fs"), "{output:?}");
}

fn refuses_an_initrd_beside_an_image(scene: &Scene) {
    configure(&scene.parts.configuration_of_image("initrd = \"/i\"")).unwrap();
    let output = scene.run(&["true"]).failed();
    assert!(output.stderr.contains("hypervisor.inlay.image must be empty where initrd is not"), "{output:?}");
}
