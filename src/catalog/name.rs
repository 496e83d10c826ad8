//! Names that people give to disks, images and replicas, and the digest that an image is known by.
//!
//! Invariant: a value of these types is safe as a file name, in a URL path and on a terminal. What
//! a user typed or a file holds becomes one of them here or nowhere.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Kind, Result};

/// The longest name, in bytes.
pub const NAME_MAX: usize = 128;

/// How much of a refused text an error quotes, in characters.
const QUOTE_MAX: usize = 40;

/// A name: a letter or digit, then letters, digits, `.`, `_` and `-`; at most [`NAME_MAX`] bytes.
///
/// Case matters. A name may look like an id or a digest where one is looked up by it; nothing new
/// gets such a name.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schema(example = "debian-12")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Refuses a name that would hide another object's id or digest, when something is created.
    pub(crate) fn for_new(&self) -> Result<()> {
        if self.id().is_some() || self.digest().is_some() {
            return Err(Error::new(
                Kind::Invalid,
                format!("name `{self}` looks like an id or a digest: choose a speaking name"),
            ));
        }
        Ok(())
    }

    /// The name by which an object is reached whose own name is not known: its id.
    pub(crate) fn of_id(id: Uuid) -> Name {
        Name(id.to_string())
    }

    /// Stands for a name that is not known.
    pub(crate) fn unknown() -> Name {
        Name("unknown".to_owned())
    }

    /// The id that this text is, if it is one.
    pub(crate) fn id(&self) -> Option<Uuid> {
        parse_id(&self.0)
    }

    /// The digest that this text is, if it is one.
    pub(crate) fn digest(&self) -> Option<Digest> {
        self.0.parse().ok()
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Name> {
        let mut bytes = text.bytes();
        let wrong = if text.is_empty() {
            "it is empty"
        } else if text.len() > NAME_MAX {
            "it is too long"
        } else if !bytes.next().is_some_and(|first| first.is_ascii_alphanumeric()) {
            "its first character is not a letter or digit"
        } else if !bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
            "it holds other characters"
        } else {
            return Ok(Name(text.to_owned()));
        };
        Err(Error::new(
            Kind::Invalid,
            format!(
                "name {}: {wrong}; a name is a letter or digit (a-z, A-Z, 0-9), then letters, \
                 digits, `.`, `_`, `-`, at most {NAME_MAX} bytes",
                quote(text)
            ),
        ))
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(text: String) -> Result<Name> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image's identity: SHA-256 over its size and its chunks' SHA-256s. As text, 64 lower-case
/// hexadecimal digits.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[0-9a-f]{64}$")]
pub struct Digest(pub [u8; 32]);

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest> {
        let bad = || {
            Error::new(
                Kind::Invalid,
                format!("digest {}: not 64 lower-case hexadecimal digits", quote(text)),
            )
        };
        if text.len() != 64 {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let (Some(high), Some(low)) = (nibble(pair[0]), nibble(pair[1])) else {
                return Err(bad());
            };
            *byte = (high << 4) | low;
        }
        Ok(Digest(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Digest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// The id that `text` is in its one accepted form: lower case, with hyphens.
pub(crate) fn parse_id(text: &str) -> Option<Uuid> {
    let id = Uuid::try_parse(text).ok()?;
    (id.as_hyphenated().encode_lower(&mut Uuid::encode_buffer()) == text).then_some(id)
}

/// `text` for an error message: in quotes, control characters escaped, no longer than is useful.
pub(crate) fn quote(text: &str) -> String {
    let mut shown: String = text.chars().take(QUOTE_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_is_allowed() {
        for good in ["a", "0", "debian-12.5_amd64", "A..", &"x".repeat(128)] {
            assert_eq!(good.parse::<Name>().unwrap().as_str(), good);
        }
        let long = "x".repeat(4000);
        let bad = [
            "",
            ".",
            "..",
            "-rf",
            "_a",
            "a/b",
            "/",
            "a\\b",
            "a\nb",
            "a\0",
            "a b",
            "ä",
            "a\u{202e}b",
            "a%2fb",
            "*",
            &long,
            "../../etc/passwd",
            ".staging-x",
            "a\r",
            "\u{1b}[31m",
        ];
        for text in bad {
            let error = text.parse::<Name>().unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            let told = error.to_string();
            assert!(told.contains("letters") && told.len() < 400, "{told}");
            assert!(!told.contains(['\n', '\r', '\0', '\u{1b}']), "{told:?}");
            assert!(serde_json::from_value::<Name>(text.into()).is_err());
        }
    }

    #[test]
    fn nothing_new_is_named_like_an_id() {
        let id = Uuid::new_v4().to_string();
        assert!(id.parse::<Name>().is_ok_and(|name| name.for_new().is_err()));
        let digest = Digest([0xab; 32]).to_string();
        assert!(digest.parse::<Name>().is_ok_and(|name| name.for_new().is_err()));
        assert!("vm1".parse::<Name>().is_ok_and(|name| name.for_new().is_ok()));
    }

    #[test]
    fn digests_and_ids_have_one_text_each() {
        let digest = Digest(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        for bad in ["", "00", &"g".repeat(64), &"AB".repeat(32), &"0".repeat(65), &"é".repeat(32)]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        let id = Uuid::from_u128(0xabcdef << 64);
        assert_eq!(parse_id(&id.to_string()), Some(id));
        assert_eq!(parse_id(&id.simple().to_string()), None);
        assert_eq!(parse_id(&id.to_string().to_uppercase()), None);
    }
}
