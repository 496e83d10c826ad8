//! What the API answers besides the things themselves: errors, and the lines of long work.
//!
//! Work that takes its time (an import, a verification) is answered with one JSON object a line:
//! any number of `{"progress":…}`, then one `{"done":…}` or `{"error":…}`. A client that goes away
//! cancels what it asked for.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::{Error, Kind};

/// A line of a streamed answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Event<T> {
    /// How far the work is.
    Progress(Progress),
    /// The work is done; nothing follows.
    Done(T),
    /// The work failed and left nothing behind; nothing follows.
    Error(ErrorBody),
}

/// How far a piece of work is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// What is being done.
    pub phase: String,
    /// Bytes of content done.
    pub done_bytes: u64,
    /// Bytes of content in all, once that is known.
    pub total_bytes: Option<u64>,
    /// Bytes read from the source, as it is packed.
    pub source_bytes: u64,
}

/// An error as the API tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What kind of failure, for programs.
    #[schema(value_type = String, example = "not_found")]
    pub kind: Kind,
    /// The object, what failed, and what to do about it.
    pub message: String,
}

/// The body of every answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Refusal {
    /// What went wrong.
    pub error: ErrorBody,
}

impl From<&Error> for ErrorBody {
    fn from(error: &Error) -> ErrorBody {
        ErrorBody { kind: error.kind(), message: error.to_string() }
    }
}

impl From<ErrorBody> for Error {
    fn from(body: ErrorBody) -> Error {
        Error::new(body.kind, body.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_documented() {
        let done: Event<u32> = Event::Done(7);
        assert_eq!(serde_json::to_string(&done).unwrap(), r#"{"done":7}"#);
        let error = Error::new(Kind::NotFound, "image x: no such image");
        let line = serde_json::to_string(&Event::<u32>::Error((&error).into())).unwrap();
        assert_eq!(line, r#"{"error":{"kind":"not_found","message":"image x: no such image"}}"#);
        let back: Event<u32> = serde_json::from_str(&line).unwrap();
        assert_eq!(back, Event::Error((&error).into()));
    }
}
