//! The hub cache on disk, laid out as `huggingface_hub` and hf-hub lay it out, so that all of them share it.
//!
//! ```text
//! models--org--name/refs/main                     the commit that a branch or tag was last seen at
//! models--org--name/snapshots/{commit}/{file}     a link to its blob
//! models--org--name/.no_exist/{commit}/{file}     empty: the commit has no such file
//! models--org--name/blobs/{sha256 or git id}      content, complete and verified
//! models--org--name/blobs/{git id}.incomplete     content so far
//! .locks/models--org--name/{git id}.lock          locked while the file is downloaded
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::bundle::HubId;
use crate::error::{Error, Kind, Result};
use crate::files;

/// A file of a commit on the hub.
#[derive(Debug, Clone)]
pub(super) struct Remote {
    /// Relative to the repository.
    pub name: String,
    pub size: u64,
    /// What git names it: of a large file, the id of its pointer.
    pub git_id: String,
    /// Large files are stored beside git, which has a pointer with their SHA-256 instead.
    pub large: bool,
}

/// The part of the cache that belongs to one repository.
#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub fn new(hub: &Path, id: &HubId) -> Cache {
        let folder = format!("models--{}--{}", id.owner, id.name);
        Cache { locks: hub.join(".locks").join(&folder), root: hub.join(folder) }
    }

    /// The commit a revision stands for, as far as the cache knows.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.into());
        }
        let text = fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Remembers the commit a revision stands for.
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        files::write_atomically(&path, |file| file.write_all(commit.as_bytes()))
    }

    /// The folder of a commit.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub fn has(&self, commit: &str, name: &str) -> bool {
        self.snapshot(commit).join(name).is_file()
    }

    /// Whether the commit is known to lack a file.
    pub fn lacks(&self, commit: &str, name: &str) -> bool {
        self.root.join(".no_exist").join(commit).join(name).exists()
    }

    /// Remembers that the commit lacks a file. A hint for later: that it cannot be written is no error.
    pub fn set_lacks(&self, commit: &str, name: &str) {
        let path = self.root.join(".no_exist").join(commit).join(name);
        let _ = create_parent(&path).and_then(|()| File::create(&path).map_err(|e| Error::io(&path, e)));
    }

    /// The blob with the content of a file, if it is here already, of whatever commit.
    pub fn blob(&self, file: &Remote) -> Option<String> {
        let blobs = self.root.join("blobs");
        let complete = |blob: &str| fs::metadata(blobs.join(blob)).is_ok_and(|m| m.is_file() && m.len() == file.size);
        if !file.large {
            return complete(&file.git_id).then(|| file.git_id.clone());
        }
        // Blobs of large files are named by their SHA-256, which the hub does not tell; but it makes the pointer.
        let names = fs::read_dir(&blobs).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| is_hex(name, 64)).find(|name| pointer_id(name, file.size) == file.git_id && complete(name))
    }

    /// Lets a file of a commit be found: links it to its blob.
    pub fn link(&self, commit: &str, name: &str, blob: &str) -> Result<()> {
        let link = self.snapshot(commit).join(name);
        create_parent(&link)?;
        let blob = match cfg!(unix) {
            true => Path::new(&"../".repeat(2 + name.matches('/').count())).join("blobs").join(blob),
            false => self.root.join("blobs").join(blob),
        };
        let mut made = make_link(&blob, &link);
        if made.as_ref().is_err_and(|e| e.kind() == ErrorKind::AlreadyExists) {
            made = fs::remove_file(&link).and_then(|()| make_link(&blob, &link)); // it leads nowhere
        }
        made.map_err(|e| on_disk(&link, e))
    }

    /// The right to download a file, for as long as the result lives; None while another process has it. On file systems
    /// without locks it is free.
    pub fn lock(&self, file: &Remote) -> Result<Option<File>> {
        let path = self.locks.join(format!("{}.lock", file.git_id));
        create_parent(&path)?;
        let lock = File::options().create(true).append(true).open(&path).map_err(|e| on_disk(&path, e))?;
        let busy = matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock));
        Ok((!busy).then_some(lock))
    }

    /// Starts to write a file, or goes on.
    pub fn open(&self, file: &Remote) -> Result<Partial> {
        let path = self.root.join("blobs").join(format!("{}.incomplete", file.git_id));
        create_parent(&path)?;
        let fail = |e| on_disk(&path, e);
        let handle = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(fail)?;
        if handle.metadata().map_err(fail)?.len() > file.size {
            handle.set_len(0).map_err(fail)?;
        }
        let mut partial =
            Partial { hash: Hash::new(file), position: 0, too_long: false, handle, path, file: file.clone() };
        let mut buffer = vec![0; 1 << 20];
        loop {
            match partial.handle.read(&mut buffer).map_err(|e| on_disk(&partial.path, e))? {
                0 => return Ok(partial),
                n => partial.advance(&buffer[..n]),
            }
        }
    }
}

/// A file that is being downloaded.
#[derive(Debug)]
pub(super) struct Partial {
    handle: File,
    path: PathBuf,
    file: Remote,
    hash: Hash,
    /// Bytes so far.
    pub position: u64,
    too_long: bool,
}

impl Partial {
    /// Whether the bytes fit in; if not, the file is not what it should be. Errors: Io.
    pub fn append(&mut self, bytes: &[u8]) -> Result<bool> {
        self.too_long = bytes.len() as u64 > self.file.size - self.position;
        if !self.too_long {
            self.handle.write_all(bytes).map_err(|e| on_disk(&self.path, e))?;
            self.advance(bytes);
        }
        Ok(!self.too_long)
    }

    fn advance(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.position += bytes.len() as u64;
    }

    /// Forgets what was downloaded.
    pub fn clear(&mut self) -> Result<()> {
        let cleared = self.handle.set_len(0).and_then(|()| self.handle.rewind());
        self.hash = Hash::new(&self.file);
        self.position = 0;
        self.too_long = false;
        cleared.map_err(|e| on_disk(&self.path, e))
    }

    /// The complete file becomes a blob, whose name is returned; None, and it stays, when the content is not what the
    /// commit says.
    pub fn finish(&mut self) -> Result<Option<String>> {
        let Some(blob) = self.hash.blob(&self.file).filter(|_| !self.too_long) else { return Ok(None) };
        let moved = self.handle.sync_all().and_then(|()| fs::rename(&self.path, self.path.with_file_name(&blob)));
        moved.map_err(|e| on_disk(&self.path, e))?;
        Ok(Some(blob))
    }
}

/// The hash that names a file's content: git's, or SHA-256 for a large one.
#[derive(Debug)]
enum Hash {
    Git(Sha1),
    Large(Sha256),
}

impl Hash {
    fn new(file: &Remote) -> Hash {
        match file.large {
            true => Hash::Large(Sha256::new()),
            false => Hash::Git(git_hash(file.size)),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hash::Git(hash) => hash.update(bytes),
            Hash::Large(hash) => hash.update(bytes),
        }
    }

    /// The blob's name, if what was hashed is the file.
    fn blob(&self, file: &Remote) -> Option<String> {
        let (blob, git_id) = match self {
            Hash::Git(hash) => (file.git_id.clone(), hex(&hash.clone().finalize())),
            Hash::Large(hash) => {
                let sha256 = hex(&hash.clone().finalize());
                let pointer = pointer_id(&sha256, file.size);
                (sha256, pointer)
            }
        };
        (git_id == file.git_id).then_some(blob)
    }
}

/// Git's id of a file is the SHA-1 of this and the content.
fn git_hash(size: u64) -> Sha1 {
    Sha1::new_with_prefix(format!("blob {size}\0"))
}

/// Git's id of the pointer to a large file.
pub(super) fn pointer_id(sha256: &str, size: u64) -> String {
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n");
    git_id(pointer.as_bytes())
}

/// Git's id of a file.
pub(super) fn git_id(content: &[u8]) -> String {
    hex(&git_hash(content.len() as u64).chain_update(content).finalize())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

fn create_parent(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(|e| on_disk(folder, e))
}

#[cfg(unix)]
fn make_link(blob: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(blob, link)
}

/// Symbolic links need privileges here.
#[cfg(not(unix))]
fn make_link(blob: &Path, link: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, link).or_else(|_| fs::copy(blob, link).map(drop))
}

/// An error of the file system that the cache is on.
pub(super) fn on_disk(path: &Path, error: std::io::Error) -> Error {
    if !matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
        return Error::io(path, error);
    }
    Error::new(Kind::Io, error.to_string()).at(path).action(
        "free some space, or set HF_HUB_CACHE to a folder on a larger disk; what is here is not downloaded again",
    )
}
