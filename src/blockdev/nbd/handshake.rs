//! The handshake: from the greeting to transmission, as a state machine without I/O.
//!
//! ```text
//!  new -> client flags -> option header <-> option data --- LIST -----------> List, then listed()
//!                              ^                |     \____ INFO, GO, ------> Open, then opened()
//!                              |                v           EXPORT_NAME          |
//!                              +----------- a reply <---------- INFO, errors ----+--> Transmit
//! ```
//!
//! The caller feeds what it received, sends what was appended to `output`, and does what the
//! [`Step`] says. [`Handshake::feed`] uses up the input but for what follows a step other than
//! [`Step::Read`]: after [`Step::Transmit`] the rest belongs to the transmission phase.
//!
//! Invariants:
//! - How the input is cut into pieces makes no difference.
//! - Every option is read to its end, also when it is refused; one that is too long for that ends
//!   the connection, as do unknown client flags, a wrong magic and more than the bounds below.
//! - Memory is bounded by [`MAX_OPTION`] for input and grows only with bytes that arrived; a reply
//!   is bounded by [`MAX_LISTING`].
//! - Where TLS is due nothing is told or opened before it; [`Step::StartTls`] is the last of what was said in
//!   the clear, and input behind it is for the caller to refuse.
//! - Extended headers, once agreed on, stay so, and take the place of structured replies.
//! - SET_META_CONTEXT replaces what was set before even where it fails, and holds for the named
//!   export only.
//!
//! Not here: the time a client may take, and the number of clients; the server bounds both.

use super::{
    context::Contexts,
    options::{self, ContextQuery, ExportQuery, Fault, Wants, put_error, put_reply},
    task::Terms,
    wire::{
        EXPORT_NAME_PADDING, GREETING, Headers, MAX_PAYLOAD, MAX_STRING, MIN_BLOCK, OPTION_HEADER,
        OPTION_MAGIC, PREFERRED_BLOCK, displayable, handshake_flag, info, option, reply,
    },
};
use crate::{
    blockdev::Info,
    error::{Error, Kind, Result},
};

/// The longest option whose data is looked at, in bytes.
pub const MAX_OPTION: u32 = 64 << 10;
/// The longest option that is read to its end to be refused, in bytes.
pub const MAX_DRAIN: u32 = 1 << 20;
/// The most options in one handshake: room to ask three things of each of thousands of exports.
pub const MAX_OPTIONS: u32 = 16 << 10;
/// The most bytes that a client may send in one handshake.
pub const MAX_HANDSHAKE: u64 = 16 << 20;
/// The most bytes of a reply to LIST.
pub const MAX_LISTING: usize = 16 << 20;

/// One client's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    secrecy: Secrecy,
    /// What arrived of the client flags, the header or the data that is waited for.
    buffer: Vec<u8>,
    client: ClientFlags,
    headers: Headers,
    /// The contexts that were chosen last, and for which export.
    contexts: Option<(String, Contexts)>,
    options: u32,
    bytes: u64,
}

/// Whether a connection is to be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Secrecy {
    /// It is served as it is.
    Plain,
    /// Nothing is served before TLS.
    Due,
    /// TLS has begun.
    Tls,
}

/// What the caller does next, after sending the output.
#[derive(Debug)]
pub enum Step {
    /// Feed more of what the client sends.
    Read,
    /// Shake hands by TLS, then feed what the client sends through it.
    StartTls,
    /// Answer with [`Handshake::listed`].
    List,
    /// Open the export and answer with [`Handshake::opened`].
    Open {
        /// As the client gave it; empty for the default export.
        name: String,
    },
    /// Serve requests to the export that was opened last.
    Transmit(Negotiated),
    /// Close the connection.
    Close(Ending),
}

/// What the handshake came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export's name, as the client gave it.
    pub name: String,
    /// What holds for requests and replies.
    pub terms: Terms,
}

/// Why a handshake ended without transmission.
#[derive(Debug)]
pub enum Ending {
    /// The client wanted it so.
    Aborted,
    /// The client broke the protocol, or the export that it named without a way to be told can't be
    /// served.
    Failed(Error),
}

/// An export that could be opened.
#[derive(Clone, Copy, Debug)]
pub struct Offer<'a> {
    /// Size and kind.
    pub info: Info,
    /// For people; empty for none. Cut to 4096 bytes.
    pub description: &'a str,
}

#[derive(Debug)]
enum State {
    Flags,
    Header,
    Data { option: u32, len: usize },
    Drain { option: u32, left: u32 },
    Listing,
    Opening { option: u32, query: ExportQuery },
    Over,
}

#[derive(Clone, Copy, Debug, Default)]
struct ClientFlags {
    fixed: bool,
    no_zeroes: bool,
}

impl Handshake {
    /// Begins: the greeting is appended to `output`.
    pub fn new(secrecy: Secrecy, output: &mut Vec<u8>) -> Handshake {
        output.extend(GREETING.to_be_bytes());
        output.extend(OPTION_MAGIC.to_be_bytes());
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        output.extend(flags.to_be_bytes());
        Handshake {
            state: State::Flags,
            secrecy,
            buffer: Vec::new(),
            client: ClientFlags::default(),
            headers: Headers::Simple,
            contexts: None,
            options: 0,
            bytes: 0,
        }
    }

    /// Takes what the client sent; returns how many bytes of it were used, and what comes next.
    ///
    /// # Panics
    /// If the caller owes [`Handshake::listed`] or [`Handshake::opened`], or the handshake is over.
    pub fn feed(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Step) {
        let mut rest = input;
        let step = loop {
            let complete = match &mut self.state {
                State::Flags => gather(&mut self.buffer, &mut rest, 4),
                State::Header => gather(&mut self.buffer, &mut rest, OPTION_HEADER),
                State::Data { len, .. } => gather(&mut self.buffer, &mut rest, *len),
                State::Drain { left, .. } => drain(left, &mut rest),
                State::Listing | State::Opening { .. } | State::Over => {
                    unreachable!("the caller does what the last step said before it feeds more")
                }
            };
            if !complete {
                break Step::Read;
            }
            match self.advance(output) {
                Step::Read => (),
                step => break step,
            }
        };
        if matches!(step, Step::Transmit(_) | Step::Close(_)) {
            self.state = State::Over;
        }
        (input.len() - rest.len(), step)
    }

    /// Answers [`Step::List`] with the names and descriptions of all exports.
    pub fn listed<'a>(
        &mut self,
        exports: impl IntoIterator<Item = (&'a str, &'a str)>,
        output: &mut Vec<u8>,
    ) {
        debug_assert!(matches!(self.state, State::Listing), "a listing nobody asked for");
        self.state = State::Header;
        let start = output.len();
        for (name, description) in exports {
            let description = displayable(description);
            if output.len() - start + name.len() + description.len() + 64 > MAX_LISTING {
                put_error(option::LIST, reply::ERR_TOO_BIG, "too many exports to list", output);
                return;
            }
            let len = (name.len() as u32).to_be_bytes();
            let parts = [&len, name.as_bytes(), description.as_bytes()];
            put_reply(option::LIST, reply::SERVER, &parts, output);
        }
        put_reply(option::LIST, reply::ACK, &[], output);
    }

    /// Answers [`Step::Open`].
    pub fn opened(&mut self, opened: Result<Offer<'_>>, output: &mut Vec<u8>) -> Step {
        let State::Opening { option, query } = std::mem::replace(&mut self.state, State::Over)
        else {
            unreachable!("an export is opened only when a step asks for it");
        };
        let offer = match opened {
            Ok(offer) => offer,
            Err(error) if option == option::EXPORT_NAME => {
                return Step::Close(Ending::Failed(error.within("NBD client with EXPORT_NAME")));
            }
            Err(error) => {
                self.state = State::Header;
                put_error(option, refusal(error.kind()), &error.to_string(), output);
                return Step::Read;
            }
        };
        let chosen = self.contexts.as_ref().filter(|(export, _)| *export == query.name);
        let contexts = chosen.map(|(_, contexts)| *contexts).unwrap_or_default();
        let terms = Terms::new(offer.info, self.headers, contexts);
        let (size, flags) = (offer.info.size.to_be_bytes(), terms.flags.to_be_bytes());
        if option == option::EXPORT_NAME {
            output.extend(size);
            output.extend(flags);
            if !self.client.no_zeroes {
                output.extend([0; EXPORT_NAME_PADDING]);
            }
        } else {
            let kind = info::EXPORT.to_be_bytes();
            put_reply(option, reply::INFO, &[&kind, &size, &flags], output);
            put_wanted(option, &query, offer.description, output);
            put_reply(option, reply::ACK, &[], output);
        }
        if option == option::INFO {
            self.state = State::Header;
            return Step::Read;
        }
        Step::Transmit(Negotiated { name: query.name, terms })
    }

    /// Acts on what was gathered; the state moves on.
    fn advance(&mut self, output: &mut Vec<u8>) -> Step {
        let mut data = std::mem::take(&mut self.buffer);
        let step = match self.state {
            State::Flags => self.flags(&data),
            State::Header => self.header(&data, output),
            State::Data { option, .. } => {
                self.state = State::Header;
                self.option(option, &data, output)
            }
            State::Drain { option, .. } => {
                self.state = State::Header;
                self.drained(option, output)
            }
            State::Listing | State::Opening { .. } | State::Over => Step::Read,
        };
        data.clear();
        self.buffer = data;
        step
    }

    fn flags(&mut self, data: &[u8]) -> Step {
        let flags = be(data) as u32;
        let fixed = u32::from(handshake_flag::FIXED_NEWSTYLE);
        let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
        if flags & !(fixed | no_zeroes) != 0 {
            return broken(format!("client flags {flags:#x}, of which some are unknown"));
        }
        self.client = ClientFlags { fixed: flags & fixed != 0, no_zeroes: flags & no_zeroes != 0 };
        self.state = State::Header;
        Step::Read
    }

    fn header(&mut self, data: &[u8], output: &mut Vec<u8>) -> Step {
        let (magic, option, len) =
            (be(&data[..8]), be(&data[8..12]) as u32, be(&data[12..]) as u32);
        if magic != OPTION_MAGIC {
            return broken(format!("an option that begins with {magic:#018x}"));
        }
        if !self.client.fixed && option != option::EXPORT_NAME {
            return broken(format!("option {option} without fixed newstyle"));
        }
        self.options += 1;
        self.bytes += OPTION_HEADER as u64 + u64::from(len);
        let name_too_long = option == option::EXPORT_NAME && len as usize > MAX_STRING;
        if name_too_long || len > MAX_DRAIN {
            if option != option::EXPORT_NAME {
                put_error(option, reply::ERR_TOO_BIG, "the option is too long", output);
            }
            return broken(format!("option {option} of {len} bytes"));
        }
        if self.options > MAX_OPTIONS || self.bytes > MAX_HANDSHAKE {
            return broken(format!("{} options of {} bytes", self.options, self.bytes));
        }
        self.state = match len > MAX_OPTION {
            true => State::Drain { option, left: len },
            false => State::Data { option, len: len as usize },
        };
        Step::Read
    }

    /// Answers an option whose data is all there.
    fn option(&mut self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Step {
        let step = match option {
            option::STARTTLS => match self.secrecy {
                Secrecy::Plain => Err(UNSUPPORTED),
                Secrecy::Tls => Err(TLS_ALREADY),
                Secrecy::Due => empty(data).map(|()| {
                    self.secrecy = Secrecy::Tls;
                    put_reply(option, reply::ACK, &[], output);
                    Step::StartTls
                }),
            },
            option::EXPORT_NAME if self.secrecy == Secrecy::Due => {
                return broken("EXPORT_NAME before TLS".to_owned());
            }
            option::EXPORT_NAME if self.headers == Headers::Extended => {
                return broken("EXPORT_NAME after EXTENDED_HEADERS".to_owned());
            }
            option::ABORT => {
                put_reply(option, reply::ACK, &[], output);
                Ok(Step::Close(Ending::Aborted))
            }
            _ if self.secrecy == Secrecy::Due => Err(TLS_DUE),
            option::EXPORT_NAME => match options::name(data) {
                Ok(name) => Ok(self.open(option, ExportQuery { name, wants: Wants::default() })),
                Err(fault) => return broken(format!("EXPORT_NAME: {}", fault.message)),
            },
            option::INFO | option::GO => {
                options::export_query(data).map(|query| self.open(option, query))
            }
            option::LIST => empty(data).map(|()| {
                self.state = State::Listing;
                Step::List
            }),
            option::STRUCTURED_REPLY if self.headers == Headers::Extended => Err(EXTENDED),
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => empty(data).map(|()| {
                self.headers = match option {
                    option::EXTENDED_HEADERS => Headers::Extended,
                    _ => Headers::Structured,
                };
                put_reply(option, reply::ACK, &[], output);
                Step::Read
            }),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.contexts(option, data, output).map(|()| Step::Read)
            }
            _ => Err(UNSUPPORTED),
        };
        step.unwrap_or_else(|fault| {
            put_error(option, fault.reply, fault.message, output);
            Step::Read
        })
    }

    fn open(&mut self, option: u32, query: ExportQuery) -> Step {
        let name = query.name.clone();
        self.state = State::Opening { option, query };
        Step::Open { name }
    }

    /// LIST_META_CONTEXT and SET_META_CONTEXT. Whether the export exists is left to INFO and GO.
    fn contexts(&mut self, option: u32, data: &[u8], output: &mut Vec<u8>) -> Result<(), Fault> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.contexts = None;
        }
        if self.headers == Headers::Simple {
            let message = "metadata contexts need structured replies; negotiate those first";
            return Err(Fault { reply: reply::ERR_INVALID, message });
        }
        let ContextQuery { name, everything, named, wildcards } = options::context_query(data)?;
        // Wildcards list but don't set, and an empty SET selects nothing.
        let told = match (set, everything) {
            (true, _) => named,
            (false, true) => Contexts::all(),
            (false, false) => named.and(wildcards),
        };
        for context in told.iter() {
            let id = if set { context.id() } else { 0 };
            let parts = [&id.to_be_bytes()[..], context.name().as_bytes()];
            put_reply(option, reply::META_CONTEXT, &parts, output);
        }
        if set {
            self.contexts = Some((name, named));
        }
        put_reply(option, reply::ACK, &[], output);
        Ok(())
    }

    /// Answers an option that was too long to look at.
    fn drained(&mut self, option: u32, output: &mut Vec<u8>) -> Step {
        match option {
            option::ABORT => return self.option(option, &[], output),
            option::SET_META_CONTEXT => self.contexts = None,
            _ => (),
        }
        let known = matches!(option, option::LIST | option::INFO..=option::EXTENDED_HEADERS);
        let fault = match known {
            _ if self.secrecy == Secrecy::Due => TLS_DUE,
            true => TOO_BIG,
            false => UNSUPPORTED,
        };
        put_error(option, fault.reply, fault.message, output);
        Step::Read
    }
}

const TOO_BIG: Fault =
    Fault { reply: reply::ERR_TOO_BIG, message: "the option is longer than 64 KiB" };
const TLS_DUE: Fault =
    Fault { reply: reply::ERR_TLS_REQD, message: "this server wants TLS first: STARTTLS" };
const TLS_ALREADY: Fault =
    Fault { reply: reply::ERR_INVALID, message: "the connection is encrypted already" };
const EXTENDED: Fault = Fault {
    reply: reply::ERR_EXT_HEADER_REQD,
    message: "extended headers were agreed on, and take the place of structured replies",
};
const UNSUPPORTED: Fault =
    Fault { reply: reply::ERR_UNSUP, message: "this server does not know the option" };

/// The reply to INFO and GO for an export that could not be opened.
fn refusal(kind: Kind) -> u32 {
    match kind {
        Kind::Permission => reply::ERR_POLICY,
        Kind::Unsupported => reply::ERR_PLATFORM,
        Kind::Unavailable => reply::ERR_SHUTDOWN,
        // "The requested export is not available", for whatever reason the message tells.
        _ => reply::ERR_UNKNOWN,
    }
}

/// Appends the information that INFO or GO asked for.
fn put_wanted(option: u32, query: &ExportQuery, description: &str, output: &mut Vec<u8>) {
    let mut put = |kind: u16, parts: &[u8]| {
        put_reply(option, reply::INFO, &[&kind.to_be_bytes(), parts], output);
    };
    if query.wants.name {
        put(info::NAME, query.name.as_bytes());
    }
    if query.wants.description && !description.is_empty() {
        put(info::DESCRIPTION, displayable(description).as_bytes());
    }
    if query.wants.block_size {
        let sizes = [MIN_BLOCK, PREFERRED_BLOCK, MAX_PAYLOAD].map(u32::to_be_bytes);
        put(info::BLOCK_SIZE, sizes.as_flattened());
    }
}

fn empty(data: &[u8]) -> Result<(), Fault> {
    match data {
        [] => Ok(()),
        _ => Err(Fault { reply: reply::ERR_INVALID, message: "this option takes no data" }),
    }
}

fn broken(what: String) -> Step {
    Step::Close(Ending::Failed(Error::new(Kind::Invalid, format!("NBD client sent {what}"))))
}

/// Moves input to the buffer until that holds `want` bytes; tells whether it does.
fn gather(buffer: &mut Vec<u8>, input: &mut &[u8], want: usize) -> bool {
    let (taken, rest) = input.split_at(input.len().min(want - buffer.len()));
    buffer.extend(taken);
    *input = rest;
    buffer.len() == want
}

/// Skips input until nothing of an option is left; tells whether that is so.
fn drain(left: &mut u32, input: &mut &[u8]) -> bool {
    let skipped = input.len().min(*left as usize);
    *input = &input[skipped..];
    *left -= skipped as u32;
    *left == 0
}

/// Up to eight bytes as one number.
fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
