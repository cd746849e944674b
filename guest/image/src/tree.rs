//! The guest's root directory in memory: sorted, so that the archive comes out the same each time.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};

/// A file of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory, mode 0755.
    Directory,
    /// A character device: major, minor.
    Device(u32, u32),
    /// A regular file.
    File {
        /// Permission bits.
        mode: u32,
        /// What is in it.
        contents: Vec<u8>,
    },
    /// A symbolic link to this target.
    Link(PathBuf),
}

/// Absolute paths and what stands there, each with the package that it came from.
#[derive(Default)]
pub struct Tree {
    nodes: BTreeMap<PathBuf, (Node, String)>,
}

impl Tree {
    /// A root with the directories that the agent mounts on and the console that the kernel opens
    /// for it.
    pub fn skeleton() -> Result<Self> {
        let mut tree = Self::default();
        for dir in ["/dev", "/etc", "/proc", "/run", "/sys", "/tmp"] {
            tree.insert(Path::new(dir), Node::Directory, "skeleton")?;
        }
        tree.insert(Path::new("/dev/console"), Node::Device(5, 1), "skeleton")?;
        Ok(tree)
    }

    /// Puts `node` at `path` and makes the directories above it. Putting the same thing twice is
    /// fine, two different things at one path are not.
    pub fn insert(&mut self, path: &Path, node: Node, origin: &str) -> Result<()> {
        let path = self.canonical(path)?;
        let above: Vec<_> = path.ancestors().skip(1).filter(|dir| *dir != Path::new("/")).map(Path::to_owned).collect();
        for dir in above {
            self.nodes.entry(dir).or_insert_with(|| (Node::Directory, origin.to_owned()));
        }
        match self.nodes.get(&path) {
            Some((present, from)) if *present != node => {
                bail!("{} comes from both {from} and {origin}", path.display())
            }
            Some(_) => {}
            None => {
                self.nodes.insert(path, (node, origin.to_owned()));
            }
        }
        Ok(())
    }

    /// Whether something stands at `path`.
    pub fn contains(&self, path: &Path) -> bool {
        self.nodes.contains_key(path)
    }

    /// Everything in path order: directories come before what is in them.
    pub fn iter(&self) -> impl Iterator<Item = (&Path, &Node, &str)> {
        self.nodes.iter().map(|(path, (node, origin))| (path.as_path(), node, origin.as_str()))
    }

    /// Follows links in the directories of `path`, so that nothing is put behind a link.
    fn canonical(&self, path: &Path) -> Result<PathBuf> {
        let mut out = PathBuf::from("/");
        let mut names = path.components().peekable();
        while let Some(component) = names.next() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => {
                    out.push(name);
                    if names.peek().is_some()
                        && let Some((Node::Link(target), _)) = self.nodes.get(&out)
                    {
                        let base = out.parent().context("The root is not a link")?;
                        out = base.join(target);
                    }
                }
                Component::ParentDir | Component::Prefix(_) => {
                    bail!("{} is not a plain absolute path", path.display())
                }
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(contents: &str) -> Node {
        Node::File { mode: 0o644, contents: contents.into() }
    }

    #[test]
    fn directories_are_made_and_sorted_before_their_contents() {
        let mut tree = Tree::default();
        tree.insert(Path::new("/a/b/c"), file("x"), "p").unwrap();
        let paths: Vec<_> = tree.iter().map(|(path, ..)| path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/a", "/a/b", "/a/b/c"]);
    }

    #[test]
    fn a_file_below_a_linked_directory_goes_where_the_link_leads() {
        let mut tree = Tree::default();
        tree.insert(Path::new("/lib64"), Node::Link("usr/lib64".into()), "p").unwrap();
        tree.insert(Path::new("/lib64/ld.so"), file("x"), "p").unwrap();
        assert!(tree.contains(Path::new("/usr/lib64/ld.so")));
    }

    #[test]
    fn two_files_at_one_path_are_refused() {
        let mut tree = Tree::default();
        tree.insert(Path::new("/x"), file("1"), "one").unwrap();
        tree.insert(Path::new("/x"), file("1"), "two").unwrap();
        let error = tree.insert(Path::new("/x"), file("2"), "two").unwrap_err();
        assert_eq!(error.to_string(), "/x comes from both one and two");
    }

    #[test]
    fn parent_directories_are_refused() {
        assert!(Tree::default().insert(Path::new("/a/../b"), file("x"), "p").is_err());
    }
}
