//! The data of the handshake's options, taken apart, and the replies to them, put together.
//!
//! Invariants: every length is checked against what is there before it is used; data must be used
//! up exactly; strings are UTF-8 without NUL and at most `MAX_STRING` bytes. What breaks a rule is a
//! [`Fault`] to answer with. Parsing allocates no more than the name it returns.

use super::{
    context::{Context, Contexts},
    wire::{self, MAX_STRING, displayable, info, reply},
};

/// The most queries in one option: far above what clients ask, far below what costs time.
const MAX_QUERIES: u32 = 1024;

/// Why an option is refused: the type of its reply and the message along with it.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// One of [`reply`]'s errors.
    pub reply: u32,
    /// For people.
    pub message: &'static str,
}

/// What INFO and GO ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportQuery {
    /// The export's name; empty for the default export.
    pub name: String,
    /// The information wanted besides INFO_EXPORT.
    pub wants: Wants,
}

/// Information that INFO and GO may ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// INFO_NAME.
    pub name: bool,
    /// INFO_DESCRIPTION.
    pub description: bool,
    /// INFO_BLOCK_SIZE.
    pub block_size: bool,
}

/// What LIST_META_CONTEXT and SET_META_CONTEXT ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextQuery {
    /// The export's name; empty for the default export.
    pub name: String,
    /// The client asked for every context there is, by asking nothing.
    pub everything: bool,
    /// Those that queries name.
    pub named: Contexts,
    /// Those of namespaces that queries ask for as a whole.
    pub wildcards: Contexts,
}

/// A name as the protocol allows it.
pub fn name(bytes: &[u8]) -> Result<String, Fault> {
    if bytes.len() > MAX_STRING {
        return fault(reply::ERR_TOO_BIG, "the export's name is longer than 4096 bytes");
    }
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(name.to_owned()),
        _ => fault(reply::ERR_INVALID, "the export's name is not UTF-8 without NUL"),
    }
}

/// Takes the data of INFO and GO apart.
pub fn export_query(data: &[u8]) -> Result<ExportQuery, Fault> {
    let mut fields = Fields(data);
    let name = name(fields.string()?)?;
    let count = fields.u16()?;
    if fields.0.len() != 2 * usize::from(count) {
        return fault(reply::ERR_INVALID, "the list of information does not fill the option");
    }
    let mut wants = Wants::default();
    for _ in 0..count {
        match fields.u16()? {
            info::NAME => wants.name = true,
            info::DESCRIPTION => wants.description = true,
            info::BLOCK_SIZE => wants.block_size = true,
            _ => (),
        }
    }
    Ok(ExportQuery { name, wants })
}

/// Takes the data of LIST_META_CONTEXT and SET_META_CONTEXT apart. Queries of other namespaces, and
/// ones that are no names of contexts at all, select nothing.
pub fn context_query(data: &[u8]) -> Result<ContextQuery, Fault> {
    let mut fields = Fields(data);
    let name = name(fields.string()?)?;
    let count = fields.u32()?;
    if count > MAX_QUERIES {
        return fault(reply::ERR_TOO_BIG, "more than 1024 queries");
    }
    let (mut named, mut wildcards) = (Contexts::default(), Contexts::default());
    for _ in 0..count {
        let asked = fields.string()?;
        let of = |text: fn(Context) -> &'static str| {
            Context::ALL.into_iter().filter(move |it| text(*it).as_bytes() == asked).collect()
        };
        named = named.and(of(Context::name));
        wildcards = wildcards.and(of(Context::namespace));
    }
    let query = ContextQuery { name, everything: count == 0, named, wildcards };
    match fields.0 {
        [] => Ok(query),
        _ => fault(reply::ERR_INVALID, "more data than queries"),
    }
}

/// Appends a reply to `option`, its payload in parts.
pub fn put_reply(option: u32, kind: u32, payload: &[&[u8]], output: &mut Vec<u8>) {
    // Payloads are bounded by the length of strings: the sum fits by far.
    let len: usize = payload.iter().map(|part| part.len()).sum();
    output.extend(wire::OPTION_REPLY_MAGIC.to_be_bytes());
    output.extend(option.to_be_bytes());
    output.extend(kind.to_be_bytes());
    output.extend((len as u32).to_be_bytes());
    for part in payload {
        output.extend(*part);
    }
}

/// Appends an error reply with its message.
pub fn put_error(option: u32, kind: u32, message: &str, output: &mut Vec<u8>) {
    put_reply(option, kind, &[displayable(message).as_bytes()], output);
}

/// Integers and strings from the front of some bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        match self.0.split_at_checked(len) {
            Some((field, rest)) => {
                self.0 = rest;
                Ok(field)
            }
            None => fault(reply::ERR_INVALID, "a length reaches past the option's end"),
        }
    }

    fn u16(&mut self) -> Result<u16, Fault> {
        let mut field = [0; 2];
        field.copy_from_slice(self.take(2)?);
        Ok(u16::from_be_bytes(field))
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        let mut field = [0; 4];
        field.copy_from_slice(self.take(4)?);
        Ok(u32::from_be_bytes(field))
    }

    /// 32 bits of length, then as many bytes.
    fn string(&mut self) -> Result<&'a [u8], Fault> {
        let len = self.u32()?;
        self.take(len as usize)
    }
}

fn fault<T>(reply: u32, message: &'static str) -> Result<T, Fault> {
    Err(Fault { reply, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(text: &[u8]) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes(), text].concat()
    }

    fn queries(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
        let mut data = string(name);
        data.extend((queries.len() as u32).to_be_bytes());
        queries.iter().for_each(|query| data.extend(string(query)));
        data
    }

    #[test]
    fn every_cut_of_an_option_is_refused() {
        let go = [&string(b"image/a")[..], &[0, 3, 0, 1, 0, 3, 0, 77]].concat();
        let wants = Wants { name: true, block_size: true, description: false };
        assert_eq!(export_query(&go), Ok(ExportQuery { name: "image/a".into(), wants }));
        let meta = queries(b"image/a", &[b"base:allocation", b"base:", b"qemu:x", b"", b"nocolon"]);
        let query = context_query(&meta).unwrap();
        let allocation: Contexts = [Context::Allocation].into_iter().collect();
        assert_eq!(
            (query.named, query.wildcards, query.everything),
            (allocation, allocation, false)
        );
        for cut in 0..go.len() {
            assert_eq!(export_query(&go[..cut]).unwrap_err().reply, reply::ERR_INVALID, "{cut}");
        }
        for cut in 0..meta.len() {
            assert_eq!(context_query(&meta[..cut]).unwrap_err().reply, reply::ERR_INVALID, "{cut}");
        }
        assert!(export_query(&[&go[..], &[0]].concat()).is_err());
        assert!(context_query(&[&meta[..], &[0]].concat()).is_err());
    }

    #[test]
    fn absurd_lengths_are_refused() {
        for len in [5, 4097, 1 << 31, u32::MAX - 3, u32::MAX] {
            let data = [&len.to_be_bytes()[..], b"name", &[0; 6]].concat();
            let small = export_query(&data[..8]).unwrap_err();
            assert_eq!(small.reply, reply::ERR_INVALID);
            assert!(context_query(&data[..8]).is_err());
            let query = [&string(b"x")[..], &[0, 0, 0, 1], &len.to_be_bytes(), b"base"].concat();
            assert_eq!(context_query(&query).unwrap_err().reply, reply::ERR_INVALID);
            let count = [&string(b"x")[..], &len.to_be_bytes()].concat();
            assert!(context_query(&count).is_err());
        }
        assert_eq!(name(&[b'x'; MAX_STRING]).unwrap().len(), MAX_STRING);
        assert_eq!(name(&[b'x'; MAX_STRING + 1]).unwrap_err().reply, reply::ERR_TOO_BIG);
        assert_eq!(name(b"a\0b").unwrap_err().reply, reply::ERR_INVALID);
        assert_eq!(name(b"\xff").unwrap_err().reply, reply::ERR_INVALID);
        let many = vec![&b"base:"[..]; 1025];
        assert_eq!(context_query(&queries(b"x", &many)).unwrap_err().reply, reply::ERR_TOO_BIG);
        assert!(context_query(&queries(b"x", &many[1..])).is_ok());
    }
}
