//! `inlay-image`: builds the guest's initrd, or an image to boot from, from a manifest.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use guest_image::manifest::{Compression, Manifest};
use guest_image::pool::Pool;
use guest_image::tree::{Node, Tree};
use guest_image::{archive, disk, libraries};
use indicatif::{ProgressBar, ProgressStyle};

/// Builds the guest's initrd, or an image to boot from, from a manifest.
///
/// Packages come from Debian's mirrors, are unpacked in the cache and never installed. The same
/// packages and files always give the same bytes.
#[derive(Parser)]
#[command(name = "inlay-image")]
struct Args {
    /// What goes in.
    #[arg(long)]
    manifest: PathBuf,
    /// A file that the manifest has by this name, such as `agent=target/inlay-agent`.
    #[arg(long = "file", value_name = "NAME=PATH", value_parser = given)]
    files: Vec<(String, PathBuf)>,
    /// What to write.
    #[arg(long, value_enum, default_value = "initrd")]
    form: Form,
    /// Where to write it.
    #[arg(long)]
    out: PathBuf,
    /// Where packages are kept between runs.
    #[arg(long)]
    cache: PathBuf,
    /// Print how large the archive is under every compression, and write nothing.
    #[arg(long)]
    compare: bool,
}

/// How the guest gets its root.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Form {
    /// A compressed archive, which the kernel unpacks into memory.
    Initrd,
    /// A file system for a drive, read-only: EROFS.
    Image,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let manifest = Manifest::load(&args.manifest)?;
    let mut tree = collect(&manifest, &args)?;

    if args.compare {
        return compare(&tree);
    }
    let scratch = args.out.with_extension("tmp");
    match args.form {
        Form::Initrd => {
            let initrd = archive::build(&tree, manifest.compression)?;
            fs::write(&scratch, initrd).with_context(|| format!("Cannot write {}", scratch.display()))?;
        }
        Form::Image => {
            disk::adapt(&mut tree)?;
            disk::build(&tree, &scratch)?;
        }
    }
    fs::rename(&scratch, &args.out)?;
    print_sizes(&tree);
    println!("{}: {} bytes", args.out.display(), fs::metadata(&args.out)?.len());
    Ok(())
}

fn given(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("a name and a path with = between them are needed")?;
    Ok((name.to_owned(), path.into()))
}

fn collect(manifest: &Manifest, args: &Args) -> Result<Tree> {
    let mut tree = Tree::skeleton()?;
    for file in &manifest.files {
        let given = args.files.iter().find(|(name, _)| *name == file.source);
        let (name, source) =
            given.with_context(|| format!("The manifest has a file {0}: --file {0}=PATH", file.source))?;
        let contents = fs::read(source).with_context(|| format!("Cannot read {}", source.display()))?;
        tree.insert(&file.target, Node::File { mode: file.mode, contents }, name)?;
    }

    let names: Vec<_> = manifest.packages.iter().map(|package| package.name.as_str()).collect();
    let bar =
        ProgressBar::new(names.len() as u64).with_style(ProgressStyle::with_template("packages {pos}/{len} {msg}")?);
    let pool = Pool::fetch(&args.cache, &names, |name| {
        bar.set_message(name.to_owned());
        bar.inc(1);
    })?;
    bar.finish_and_clear();

    for package in &manifest.packages {
        for file in &package.files {
            copy_with_libraries(&mut tree, &pool, &package.name, file)?;
        }
        if let Some(applets) = &package.applets {
            for link in &applets.links {
                tree.insert(link, Node::Link(applets.to.clone()), &package.name)?;
            }
        }
    }
    Ok(tree)
}

/// Copies a file of a package, what its links lead to, and the libraries that it needs.
fn copy_with_libraries(tree: &mut Tree, pool: &Pool, package: &str, file: &Path) -> Result<()> {
    if tree.contains(file) {
        return Ok(());
    }
    let relative = file.strip_prefix("/").with_context(|| format!("{} is not absolute", file.display()))?;
    let source = pool.root(package)?.join(relative);
    let about = || format!("Package {package} has no file {}", file.display());
    let metadata = source.symlink_metadata().with_context(about)?;
    if metadata.is_symlink() {
        let target = fs::read_link(&source)?;
        tree.insert(file, Node::Link(target.clone()), package)?;
        let beside = file.parent().unwrap_or(Path::new("/")).join(target);
        return copy_with_libraries(tree, pool, package, &beside);
    }
    let contents = fs::read(&source).with_context(about)?;
    let needs = libraries::needs(&contents).with_context(|| file.display().to_string())?;
    let mode = metadata.permissions().mode() & 0o777;
    tree.insert(file, Node::File { mode, contents }, package)?;

    let interpreter = needs.interpreter.iter().filter_map(|path| path.file_name()?.to_str());
    for library in needs.libraries.iter().map(String::as_str).chain(interpreter) {
        let (owner, relative) = libraries::find(pool, library)
            .with_context(|| format!("{} needs {library}, which no package in the manifest has", file.display()))?;
        copy_with_libraries(tree, pool, owner, &Path::new("/").join(relative))?;
    }
    // The loader must also be found under the name that the program asks for.
    if let Some(path) = &needs.interpreter
        && !tree.contains(path)
    {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some((owner, relative)) = libraries::find(pool, name) {
            tree.insert(path, Node::Link(Path::new("/").join(relative)), owner)?;
        }
    }
    Ok(())
}

fn print_sizes(tree: &Tree) {
    let mut sizes: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for (_, node, origin) in tree.iter() {
        let bytes = if let Node::File { contents, .. } = node { contents.len() } else { 0 };
        let entry = sizes.entry(origin).or_default();
        *entry = (entry.0 + 1, entry.1 + bytes);
    }
    println!("| package | files | bytes |\n| --- | ---: | ---: |");
    for (origin, (files, bytes)) in sizes {
        println!("| {origin} | {files} | {bytes} |");
    }
}

fn compare(tree: &Tree) -> Result<()> {
    println!("| compression | bytes |\n| --- | ---: |");
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        println!("| {compression:?} | {} |", archive::build(tree, compression)?.len());
    }
    Ok(())
}
