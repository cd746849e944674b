//! The directory of templates.
//!
//! ```text
//! /run/inlay/templates/<name>/         a template: record, manifest, state, memory or where that is
//! /run/inlay/templates/.<name>.lock    there while somebody makes or removes it
//! /run/inlay/templates/.<name>.draft/  a template that is being made, or that a killed maker left
//! /run/inlay/templates/.<name>.old/    one that is being removed
//! /run/inlay/templates/.<name>.failed  when making it failed, and why
//! /run/inlay/templates/.chunks         what has come of memories that are elsewhere, for all of their sandboxes
//! ```
//!
//! A name is changed by whoever holds its lock. What appears under a name is a whole template; what was restored from
//! one that has gone keeps its files.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::record::INDEX;
use super::{Template, TemplateError, file_error};
use crate::config::Config;
use crate::file_lock::FileLock;
use crate::ids::Id;
use crate::run_dir::RunDir;

/// Longest report of a failure that is read.
const MAX_FAILURE: usize = 8 << 10;

/// The templates of a host.
#[derive(Debug, Clone)]
pub struct Store {
    base: PathBuf,
}

impl Store {
    /// Where `config` wants them, or the usual place.
    pub fn new(config: &Config, run_dir: &RunDir) -> Self {
        Self { base: config.factory.path.clone().unwrap_or_else(|| run_dir.templates()) }
    }

    /// Where the template `name` is.
    pub fn path(&self, name: &Id) -> PathBuf {
        self.base.join(name.as_str())
    }

    /// All names that are taken, in order.
    pub fn names(&self) -> Result<Vec<Id>, TemplateError> {
        let mut names = Vec::new();
        let entries = match fs::read_dir(&self.base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(names),
            entries => entries.map_err(file_error("read", &self.base))?,
        };
        for entry in entries {
            let entry = entry.map_err(file_error("read", &self.base))?;
            // What begins with a dot is no name.
            names.extend(entry.file_name().to_str().and_then(|name| Id::try_from(name).ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Takes the lock of `name`. `None` if somebody else has it, unless this `waits`.
    pub fn lock(&self, name: &Id, waits: bool) -> Result<Option<Lock>, TemplateError> {
        self.make_base()?;
        let path = self.beside(name, "lock");
        let taken = FileLock::take(&path, waits).map_err(file_error("lock", &path))?;
        Ok(taken.map(|file| Lock { _file: file }))
    }

    /// A fresh directory for a template that is being made. What a killed maker left is removed first.
    pub fn draft(&self, name: &Id, _lock: &Lock) -> Result<Draft, TemplateError> {
        self.clear(name)?;
        let path = self.beside(name, "draft");
        DirBuilder::new().mode(0o700).create(&path).map_err(file_error("make", &path))?;
        Ok(Draft { path })
    }

    /// Gives the draft the name `name`. A template that had it is removed.
    pub fn publish(&self, name: &Id, draft: Draft, _lock: &Lock) -> Result<(), TemplateError> {
        let path = self.path(name);
        let renamed = match renameat2(AT_FDCWD, &draft.path, AT_FDCWD, &path, RenameFlags::RENAME_EXCHANGE) {
            // Now the draft is the old one, and goes when it is dropped.
            Ok(()) => Ok(()),
            Err(Errno::ENOENT) => fs::rename(&draft.path, &path),
            Err(errno) => Err(errno.into()),
        };
        renamed.map_err(file_error("publish", &path))?;
        let _ = fs::remove_file(self.beside(name, "failed"));
        self.forget_chunks();
        Ok(())
    }

    /// The cache of chunks.
    pub fn chunks(&self) -> PathBuf {
        self.base.join(".chunks")
    }

    /// Removes the template `name`, and what was left by making it. Waits for whoever is making it.
    pub fn remove(&self, name: &Id) -> Result<(), TemplateError> {
        let Some(_lock) = self.lock(name, true)? else { return Ok(()) };
        let noted = fs::remove_file(self.beside(name, "failed")).is_ok();
        let cleared = self.clear(name)?;
        let removed = match self.take_away(name) {
            Err(TemplateError::Missing(_)) if cleared || noted => Ok(()),
            removed => removed,
        };
        self.forget_chunks();
        removed
    }

    /// Removes the cache of chunks if there is no template any more whose memory is elsewhere. Who has it open keeps it.
    fn forget_chunks(&self) {
        let needs = |name: &Id| self.path(name).join(INDEX).exists();
        if self.names().is_ok_and(|names| !names.iter().any(needs)) {
            let _ = fs::remove_file(self.chunks());
        }
    }

    /// Removes a template that turned out to be of no use, if its name still is its own and nobody is at it.
    pub fn discard(&self, template: &Template) {
        let name = &template.record().name;
        let discard = || match self.lock(name, false)? {
            Some(_lock) if template.is_at(&self.path(name)) => self.take_away(name),
            _ => Ok(()),
        };
        if let Err(error) = discard() {
            tracing::warn!(error = crate::bootstrap::with_causes(&error), "Cannot remove a template");
        }
    }

    /// Notes that `name` could not be made. Best effort.
    pub fn note_failure(&self, name: &Id, why: &str) {
        let _ = fs::write(self.beside(name, "failed"), why);
    }

    /// Why `name` could not be made, if that is not longer ago than `since`.
    pub fn recent_failure(&self, name: &Id, since: Duration) -> Option<String> {
        let path = self.beside(name, "failed");
        let noted = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
        let is_recent = SystemTime::now().duration_since(noted).is_ok_and(|age| age < since);
        let mut why = fs::read_to_string(&path).ok().filter(|_| is_recent)?;
        let mut end = why.len().min(MAX_FAILURE);
        while !why.is_char_boundary(end) {
            end = end.saturating_sub(1);
        }
        why.truncate(end);
        Some(why)
    }

    /// Takes the name away first, so that nobody finds half a template under it.
    fn take_away(&self, name: &Id) -> Result<(), TemplateError> {
        let (path, old) = (self.path(name), self.beside(name, "old"));
        match fs::rename(&path, &old) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(TemplateError::Missing(name.clone())),
            renamed => renamed.map_err(file_error("rename", &path))?,
        }
        fs::remove_dir_all(&old).map_err(file_error("remove", &old))
    }

    /// Removes what was left. Returns whether anything was.
    fn clear(&self, name: &Id) -> Result<bool, TemplateError> {
        let mut any = false;
        for what in ["draft", "old"] {
            let path = self.beside(name, what);
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => {
                    removed.map_err(file_error("remove", &path))?;
                    any = true;
                }
            }
        }
        Ok(any)
    }

    fn beside(&self, name: &Id, what: &str) -> PathBuf {
        self.base.join(format!(".{name}.{what}"))
    }

    /// For this user alone: memory files hold guests' secrets.
    fn make_base(&self) -> Result<(), TemplateError> {
        if self.base.is_dir() {
            return Ok(());
        }
        let parent = self.base.parent().unwrap_or(Path::new("/"));
        DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(file_error("make", parent))?;
        match DirBuilder::new().mode(0o700).create(&self.base) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(file_error("make", &self.base)),
        }
    }
}

/// The right to change what is under a name. The kernel takes it from a process that ends.
#[derive(Debug)]
pub struct Lock {
    _file: FileLock,
}

/// A template that is being made. Dropped, it is gone.
#[derive(Debug)]
pub struct Draft {
    path: PathBuf,
}

impl Draft {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(directory = %self.path.display(), %error, "Cannot remove what is left of a template");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store, Id) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store { base: dir.path().join("run/templates") };
        (dir, store, Id::try_from("t").unwrap())
    }

    fn entries(store: &Store) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(&store.base).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn publish(store: &Store, name: &Id, content: &str) {
        let lock = store.lock(name, true).unwrap().unwrap();
        let draft = store.draft(name, &lock).unwrap();
        fs::write(draft.path().join("file"), content).unwrap();
        store.publish(name, draft, &lock).unwrap();
    }

    #[test]
    fn one_at_a_time_changes_a_name() {
        let (_dir, store, name) = store();
        let lock = store.lock(&name, false).unwrap().unwrap();
        assert!(store.lock(&name, false).unwrap().is_none());
        let other = Id::try_from("u").unwrap();
        assert!(store.lock(&other, false).unwrap().is_some());
        let waiting = std::thread::spawn({
            let (store, name) = (store.clone(), name.clone());
            move || store.lock(&name, true).unwrap().is_some()
        });
        drop(lock);
        assert!(waiting.join().unwrap());
        // Nothing is left of locks.
        assert_eq!(entries(&store), [""; 0]);
        assert!(store.lock(&name, false).unwrap().is_some());
    }

    #[test]
    fn many_who_want_a_lock_get_it_one_after_the_other() {
        let (_dir, store, name) = store();
        let inside = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let lock = store.lock(&name, true).unwrap().unwrap();
                    assert_eq!(inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    drop(lock);
                });
            }
        });
        assert_eq!(entries(&store), [""; 0]);
    }

    #[test]
    fn a_template_takes_the_place_of_another_and_goes_with_all_that_is_left() {
        let (_dir, store, name) = store();
        assert_eq!(store.names().unwrap(), []);
        publish(&store, &name, "first");
        let held = fs::File::open(store.path(&name).join("file")).unwrap();
        publish(&store, &name, "second");
        assert_eq!(fs::read_to_string(store.path(&name).join("file")).unwrap(), "second");
        // Who has the first one open keeps it.
        assert_eq!(io::read_to_string(held).unwrap(), "first");
        assert_eq!((store.names().unwrap(), entries(&store)), (vec![name.clone()], vec!["t".to_owned()]));

        store.note_failure(&name, "why");
        fs::create_dir_all(store.beside(&name, "draft/share")).unwrap();
        store.remove(&name).unwrap();
        assert_eq!(entries(&store), [""; 0]);
        assert!(matches!(store.remove(&name), Err(TemplateError::Missing(_))));
        // A note of a failure is all that there is.
        store.note_failure(&name, "why");
        store.remove(&name).unwrap();
        assert_eq!(entries(&store), [""; 0]);
    }

    #[test]
    fn cached_chunks_go_with_the_last_template_that_needs_them() {
        let (_dir, store, name) = store();
        let other = Id::try_from("u").unwrap();
        for name in [&name, &other] {
            publish(&store, name, "x");
            fs::write(store.path(name).join(INDEX), "index").unwrap();
        }
        fs::write(store.chunks(), "chunks").unwrap();
        store.remove(&other).unwrap();
        assert!(store.chunks().exists() && store.names().unwrap() == [name.clone()]);
        // One that is here takes its place.
        publish(&store, &name, "y");
        assert!(!store.chunks().exists());
    }

    #[test]
    fn a_draft_that_is_given_up_is_gone_and_so_is_one_of_a_killed_maker() {
        let (_dir, store, name) = store();
        let lock = store.lock(&name, true).unwrap().unwrap();
        drop(store.draft(&name, &lock).unwrap());
        let killed = store.draft(&name, &lock).unwrap();
        fs::write(killed.path().join("memory.new"), "x").unwrap();
        std::mem::forget(killed);
        let fresh = store.draft(&name, &lock).unwrap();
        assert_eq!(fs::read_dir(fresh.path()).unwrap().count(), 0);
        drop((fresh, lock));
        assert_eq!(entries(&store), [""; 0]);
    }

    #[test]
    fn failures_are_remembered_for_a_while() {
        let (_dir, store, name) = store();
        drop(store.lock(&name, true).unwrap());
        assert_eq!(store.recent_failure(&name, Duration::from_secs(60)), None);
        store.note_failure(&name, &"é".repeat(MAX_FAILURE));
        assert_eq!(store.recent_failure(&name, Duration::from_secs(60)).unwrap().len(), MAX_FAILURE);
        assert_eq!(store.recent_failure(&name, Duration::ZERO), None);
        publish(&store, &name, "x");
        assert_eq!(store.recent_failure(&name, Duration::from_secs(60)), None);
    }
}
