//! The one error type of the crate: what was being done, why it failed, and what to do next.

use std::fmt;
use std::path::{Path, PathBuf};

/// What fails here fails with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for callers that react to it. The text of [`Error`] is for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A file could not be read, mapped or written.
    Io,
    /// A file's content is broken: truncated, overlapping, not what its header says.
    Format,
    /// The content is well-formed but not something this runtime runs.
    Unsupported,
    /// A caller's argument is out of range: an empty prompt, a token id beyond the vocabulary.
    Argument,
    /// Shapes or dtypes do not fit together.
    Shape,
    /// What was asked for does not fit into the memory it may use.
    Memory,
    /// A NaN or an infinity where a number is needed.
    Numeric,
    /// A router file belongs to another base model.
    Mismatch,
    /// A GPU, its driver or one of its libraries failed.
    Device,
    /// The caller asked for it to stop.
    Interrupted,
}

/// So many bytes of a cause are shown at most: it may quote a file.
const SHOWN: usize = 1000;

/// An error that names the operation, the cause and the next action.
///
/// Displayed on one line: `path: cause (while op); action`.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::{Error, Kind};
///
/// let error = Error::new(Kind::Format, "no field `gold`").at("a.jsonl").during("reading line 3").action("add it");
/// assert_eq!(error.to_string(), "a.jsonl: no field `gold` (while reading line 3); add it");
/// assert_eq!((error.kind(), error.path()), (Kind::Format, Some(Path::new("a.jsonl"))));
///
/// let error = std::fs::read("b.jsonl").map_err(|e| Error::io("b.jsonl", e)).unwrap_err();
/// assert!(error.kind() == Kind::Io && error.to_string().ends_with("; check the path"));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Error(Box<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    kind: Kind,
    cause: String,
    op: Option<String>,
    path: Option<PathBuf>,
    action: Option<String>,
}

impl Error {
    /// An error that names no file, operation or action yet.
    pub fn new(kind: Kind, cause: impl Into<String>) -> Self {
        Error(Box::new(Inner { kind, cause: cause.into(), op: None, path: None, action: None }))
    }

    /// An input/output error on `path`.
    pub fn io(path: impl AsRef<Path>, error: std::io::Error) -> Self {
        let action = match error.kind() {
            std::io::ErrorKind::NotFound => "check the path",
            std::io::ErrorKind::PermissionDenied => "check the permissions of the file",
            _ => "check the file and the disk",
        };
        Error::new(Kind::Io, error.to_string()).at(path).action(action)
    }

    /// Names the file it is about. The innermost path wins: it is the most precise.
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Names the operation that failed. The innermost wins.
    pub fn during(mut self, op: impl Into<String>) -> Self {
        self.0.op.get_or_insert_with(|| op.into());
        self
    }

    /// Says what the user can do about it. The innermost wins.
    pub fn action(mut self, action: impl Into<String>) -> Self {
        self.0.action.get_or_insert_with(|| action.into());
        self
    }

    /// What went wrong, to react to.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The file the error is about, if it is about one.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &self.0;
        if let Some(path) = &e.path {
            write!(f, "{}: ", path.display())?;
        }
        f.write_str(&e.cause[..e.cause.floor_char_boundary(SHOWN)])?;
        if e.cause.len() > SHOWN {
            f.write_str("…")?;
        }
        if let Some(op) = &e.op {
            write!(f, " (while {op})")?;
        }
        if let Some(action) = &e.action {
            write!(f, "; {action}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

/// Returns early with an [`Error`] of the kind when the condition does not hold.
macro_rules! ensure {
    ($cond:expr, $kind:ident, $($message:tt)+) => {
        if !$cond {
            return Err($crate::error::Error::new($crate::error::Kind::$kind, format!($($message)+)));
        }
    };
}
pub(crate) use ensure;

/// Errors: Argument, naming the value and its range, when it does not fit.
pub(crate) fn check_range(name: &str, value: impl fmt::Display, fits: bool, range: &str) -> Result<()> {
    let error = || Error::new(Kind::Argument, format!("{name} is {value}")).action(format!("give {range}"));
    if fits { Ok(()) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_path_cause_op_and_action() {
        let e = Error::new(Kind::Format, "header is cut off")
            .at("a.safetensors")
            .at("outer")
            .during("loading weights")
            .action("download it again");
        assert_eq!(e.to_string(), "a.safetensors: header is cut off (while loading weights); download it again");
        assert_eq!(e.kind(), Kind::Format);
        let e = Error::new(Kind::Format, "é".repeat(600)).action("shorten it");
        assert_eq!(e.to_string(), format!("{}…; shorten it", "é".repeat(500)));
    }
}
