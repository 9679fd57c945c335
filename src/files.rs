//! Files: mapped for reading, written all or nothing.

use std::fs::{self, File, TryLockError};
use std::io::{BufWriter, Write};
use std::path::{Component, Path};

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result, ensure};
use crate::tensor::Bytes;

/// What of a model is not weights has at most so many bytes. The largest vocabularies take 35 MB, and memory is several times
/// the file.
const MAX_SMALL: u64 = 1 << 27;

/// Reads a file whole.
///
/// Errors: Io; not a regular file (a pipe would block, a device never end).
pub fn read(path: &Path) -> Result<Vec<u8>> {
    ensure_regular(path)?;
    fs::read(path).map_err(|e| Error::io(path, e))
}

/// Reads a file of a model that is not weights. Errors: as of [`read`]; Unsupported when it is too long.
pub fn read_small(path: &Path) -> Result<Vec<u8>> {
    let length = ensure_regular(path)?;
    if length > MAX_SMALL {
        let cause = format!("{length} bytes; the limit is {MAX_SMALL}");
        return Err(Error::new(Kind::Unsupported, cause).at(path).action("download the file again"));
    }
    read(path)
}

/// The same of a file that may be absent.
pub fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>> {
    if path.exists() { read_small(path).map(Some) } else { Ok(None) }
}

/// 32 hex digits of the SHA-256.
pub(crate) fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)[..16].iter().map(|b| format!("{b:02x}")).collect()
}

/// Maps a file read-only. Any number of processes may map one file; they share its memory.
///
/// A shared advisory lock is held as long as the bytes are: writers that lock the file exclusively, as they should, are
/// kept out, and one that is at work is reported here. A writer that ignores locks and *truncates* the file takes mapped
/// pages away: reading them then ends the process (SIGBUS). Writers that replace the file by renaming, as
/// [`write_atomically`], the hub cache and safetensors do, are harmless: the old content lives until it is unmapped.
///
/// Errors: Io.
pub fn map(path: &Path) -> Result<Bytes> {
    struct Mapped {
        map: Mmap,
        _lock: File,
    }
    impl AsRef<[u8]> for Mapped {
        fn as_ref(&self) -> &[u8] {
            &self.map
        }
    }

    ensure_regular(path)?;
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => {
            return Err(Error::new(Kind::Io, "another process has locked it for writing")
                .at(path)
                .action("wait for it"));
        }
        // File systems without locks are as good as unlocked files.
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    // SAFETY: the mapping is private to this crate, read-only and never handed out mutably, so Rust code cannot write to
    // it. It rests on no other process changing the file in place while it is mapped: whoever replaces a model does so by
    // renaming or under a lock (see above).
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    Ok(Bytes::new(Mapped { map, _lock: file }))
}

/// Whether a name, of whatever origin, stays within the folder that it is joined to.
pub fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|c| matches!(c, Component::Normal(_)))
}

/// Bytes of a regular file.
fn ensure_regular(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    Err(Error::new(Kind::Io, "not a regular file").at(path).action("check the path"))
}

/// Writes a file all or nothing: into a temporary file beside it, synced to the disk, then renamed. Readers see the old
/// content or the new one; after an error the old one stands and the temporary file is gone.
///
/// Errors: Io.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    ensure!(!name.is_empty(), Argument, "{} names no file to write", path.display());
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));

    let prefix = format!(".{name}.");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)] // what an ordinary file gets, less the umask; temporary files are private otherwise
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));

    let attempt = || {
        let file = builder.tempfile_in(folder)?;
        let mut writer = BufWriter::with_capacity(1 << 20, file);
        write(&mut writer)?;
        let file = writer.into_inner()?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    attempt().map_err(|e| Error::io(path, e).during("writing it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomically(&path, |f| f.write_all(b"old")).unwrap();
        let error = write_atomically(&path, |f| {
            f.write_all(b"half of the n")?;
            Err(std::io::Error::other("the disk is full"))
        });
        assert!(error.unwrap_err().to_string().contains("a.json: the disk is full (while writing it); "));
        assert_eq!(read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_atomically(&dir.path().join("no/such/folder"), |_| Ok(())).is_err());
        assert!(write_atomically(Path::new("/"), |_| Ok(())).is_err());
    }

    #[test]
    fn a_writer_with_a_lock_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        fs::write(&path, b"abc").unwrap();
        let first = map(&path).unwrap();
        let second = map(&path).unwrap();
        assert_eq!((&first[..], &second[..]), (&b"abc"[..], &b"abc"[..]));

        let writer = File::options().write(true).open(&path).unwrap();
        assert!(matches!(writer.try_lock(), Err(TryLockError::WouldBlock)), "readers keep writers out");
        drop((first, second));
        writer.try_lock().unwrap();
        let error = map(&path).unwrap_err();
        assert!(error.to_string().contains("locked it for writing; wait"), "{error}");
    }

    #[test]
    fn what_is_no_file_or_too_long_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(map(dir.path()).unwrap_err().to_string().contains("not a regular file"));
        assert!(map(&dir.path().join("absent")).unwrap_err().to_string().contains("check the path"));
        fs::write(dir.path().join("empty"), b"").unwrap();
        assert!(map(&dir.path().join("empty")).unwrap().is_empty());

        let long = dir.path().join("tokenizer.json");
        File::create(&long).unwrap().set_len(MAX_SMALL + 1).unwrap(); // a hole, which takes no room
        let error = read_if_exists(&long).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(
            error.to_string().contains("tokenizer.json: 134217729 bytes; the limit is 134217728; download"),
            "{error}"
        );
    }
}
