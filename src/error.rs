//! One error for the whole library: what kind it is, in what context it arose, what caused it.
//!
//! The kind is what programs match on; the context names the object ("image debian-12", "disk b")
//! and what to do about it. This is the one place that turns errors into `errno` and NBD codes,
//! HTTP statuses and back.

use std::{fmt, io};

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The caller asked for something that makes no sense: a bad name, size or combination.
    Invalid,
    /// A range beyond the end of a device.
    OutOfRange,
    /// No such disk, image, replica, file.
    NotFound,
    /// The name is taken.
    Exists,
    /// Somebody still uses it; the context names them.
    InUse,
    /// Another daemon or operation holds it.
    Locked,
    /// A write to something that can only be read.
    ReadOnly,
    /// The disk is full.
    NoSpace,
    /// A disk, file system or network failed.
    Io,
    /// What was read is not what was written, or not what it says it is.
    Corrupt,
    /// An earlier sync failed: nothing more is acknowledged.
    Poisoned,
    /// A format version, feature or kernel that this build cannot serve.
    Unsupported,
    /// The caller may not.
    Permission,
    /// The daemon is not there, or is going away.
    Unavailable,
    /// Whoever asked for it gave it up.
    Cancelled,
}

impl Kind {
    /// The Linux `errno` that stands for this kind.
    pub const fn errno(self) -> i32 {
        match self {
            Kind::Invalid | Kind::OutOfRange => libc::EINVAL,
            Kind::NotFound => libc::ENOENT,
            Kind::Exists => libc::EEXIST,
            Kind::InUse | Kind::Locked => libc::EBUSY,
            Kind::ReadOnly | Kind::Permission => libc::EPERM,
            Kind::NoSpace => libc::ENOSPC,
            Kind::Io | Kind::Corrupt | Kind::Poisoned => libc::EIO,
            Kind::Unsupported => libc::EOPNOTSUPP,
            Kind::Unavailable => libc::ESHUTDOWN,
            Kind::Cancelled => libc::ECANCELED,
        }
    }

    /// The error code of the NBD protocol that stands for this kind. NBD knows few:
    /// whatever it has no word for is EIO.
    pub const fn nbd(self) -> u32 {
        match self {
            Kind::ReadOnly | Kind::Permission => 1,
            // ENOTSUP is kept for zeroing that can't be fast.
            Kind::Invalid | Kind::OutOfRange | Kind::Unsupported => 22,
            Kind::NoSpace => 28,
            Kind::Unavailable => 108,
            _ => 5,
        }
    }

    /// The HTTP status of the control API that stands for this kind.
    pub const fn http(self) -> u16 {
        match self {
            Kind::Invalid | Kind::OutOfRange | Kind::Unsupported => 400,
            Kind::Permission | Kind::ReadOnly => 403,
            Kind::NotFound => 404,
            Kind::Exists | Kind::InUse | Kind::Locked | Kind::Cancelled => 409,
            Kind::Corrupt => 422,
            Kind::Io | Kind::Poisoned => 500,
            Kind::Unavailable => 503,
            Kind::NoSpace => 507,
        }
    }
}

/// An error: its kind, the context that names the object, and the cause.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`; `context` names the object, what failed and what to do.
    pub fn new(kind: Kind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), source: None }
    }

    /// What failed with `source`; the kind follows from it.
    pub fn io(context: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Kind::NoSpace,
            Some(libc::EROFS) => Kind::ReadOnly,
            Some(libc::EACCES | libc::EPERM) => Kind::Permission,
            Some(libc::ENOENT | libc::ENOTDIR) => Kind::NotFound,
            Some(libc::EEXIST) => Kind::Exists,
            Some(libc::EOPNOTSUPP) => Kind::Unsupported,
            _ if source.kind() == io::ErrorKind::UnexpectedEof => Kind::Corrupt,
            _ if source.kind() == io::ErrorKind::StorageFull => Kind::NoSpace,
            _ => Kind::Io,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// An error of `kind` caused by `source`.
    pub fn caused(
        kind: Kind,
        context: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// The same error, with a wider context before its own.
    #[must_use]
    pub fn within(mut self, context: impl fmt::Display) -> Error {
        self.context = format!("{context}: {}", self.context);
        self
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        let mut cause = self.source.as_deref().map(|e| e as &dyn std::error::Error);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Adds a context to the errors of others: `file.sync_all().context(|| format!("syncing {path}"))?`.
pub trait Context<T> {
    /// Wraps the error, if any, in an [`Error`] whose context is made by `context`.
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|source| Error::io(context(), source))
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context<C: Into<String>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|errno| Error::io(context(), errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_decide_the_kind_and_are_told() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::io("writing overlay of replica vm1", full).within("disk b");
        assert_eq!(error.kind(), Kind::NoSpace);
        assert_eq!(error.kind().nbd(), 28);
        let text = error.to_string();
        assert!(
            text.starts_with("disk b: writing overlay of replica vm1: No space left"),
            "{text}"
        );
    }
}
