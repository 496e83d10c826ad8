//! The kernel's description of its own types (BTF): where a structure's member lies, and what a function
//! takes. The little of the format that answers these two.
//!
//! Format: Documentation/bpf/btf.rst of the kernel. A header, then types one after the other, numbered from
//! 1 (0 is void), then the names that they refer to.
//!
//! Invariant: whatever the bytes are, nothing here panics, or follows them without an end.

use std::ops::Range;

/// A type's number.
pub type Id = u32;

/// Most names, qualifiers and tags of one type that are looked through.
const ALIASES: usize = 32;
/// How deep a structure's nameless parts are looked into.
const NESTED: usize = 8;
/// Size of the head of a type, in bytes: name, information, size or type.
const HEAD: usize = 12;

/// What a type is, names and qualifiers taken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A pointer to this.
    Pointer(Id),
    /// A structure or union.
    Struct(Id),
    /// A function with so many parameters.
    Function(Id),
    /// A number of so many bytes.
    Number(u32),
    /// Anything else.
    Other,
}

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its type.
    pub of: Id,
}

/// Types, and their names.
pub struct Btf {
    bytes: Vec<u8>,
    /// Where each type begins, from number 1 on.
    types: Vec<usize>,
    names: Range<usize>,
}

/// The kinds of types, as the format numbers them.
mod kind {
    pub const INT: u32 = 1;
    pub const POINTER: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FORWARD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNCTION: u32 = 12;
    pub const PROTOTYPE: u32 = 13;
    pub const VARIABLE: u32 = 14;
    pub const SECTION: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECLARATION_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// The head of a type.
#[derive(Clone, Copy)]
struct Head {
    /// Where what follows it begins.
    rest: usize,
    name: u32,
    kind: u32,
    /// How many members or parameters follow.
    count: usize,
    /// Members' offsets have sizes of bit fields with them.
    fields: bool,
    /// A size, or another type.
    value: u32,
}

impl Btf {
    /// Takes a description apart; says what is wrong with it.
    pub fn parse(bytes: Vec<u8>) -> Result<Btf, String> {
        let word = |at| word(&bytes, at).ok_or("it ends within its header");
        // Magic number 0xeb9f, version 1; all numbers little-endian, as the programs are.
        if word(0)? & 0xff_ffff != 0x01_eb9f {
            return Err("it is not BTF of version 1".into());
        }
        let head = word(4)? as usize;
        let section = |at| -> Result<Range<usize>, &str> {
            let from = head.checked_add(word(at)? as usize);
            let to = from.and_then(|from| from.checked_add(word(at + 4).ok()? as usize));
            match (from, to) {
                (Some(from), Some(to)) if to <= bytes.len() => Ok(from..to),
                _ => Err("it is shorter than its header says"),
            }
        };
        let (types, names) = (section(8)?, section(16)?);
        let mut btf = Btf { types: Vec::new(), names, bytes };
        let mut at = types.start;
        while at < types.end {
            let head = btf.head_at(at).ok_or("it ends within a type")?;
            btf.types.push(at);
            let follows = match head.kind {
                kind::INT | kind::VARIABLE | kind::DECLARATION_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::SECTION | kind::ENUM64 => 12 * head.count,
                kind::ENUM | kind::PROTOTYPE => 8 * head.count,
                kind::POINTER | kind::FORWARD | kind::FUNCTION | kind::FLOAT => 0,
                kind if alias(kind) => 0,
                kind => return Err(format!("it has a type of the unknown kind {kind}")),
            };
            at = head.rest + follows;
        }
        Ok(btf)
    }

    /// The description as it was given.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What is declared under this name by `typedef`.
    pub fn typedef(&self, name: &str) -> Option<Id> {
        let mut heads = self.types.iter().filter_map(|at| self.head_at(*at));
        let found = heads.find(|head| head.kind == kind::TYPEDEF && self.is_named(head, name));
        found.map(|head| head.value)
    }

    /// What a type is.
    pub fn shape(&self, id: Id) -> Shape {
        let Some((id, head)) = self.resolve(id) else { return Shape::Other };
        match head.kind {
            kind::POINTER => Shape::Pointer(head.value),
            kind::STRUCT | kind::UNION => Shape::Struct(id),
            kind::PROTOTYPE => Shape::Function(id),
            kind::INT | kind::ENUM | kind::ENUM64 => Shape::Number(head.value),
            _ => Shape::Other,
        }
    }

    /// The parameters of a function.
    pub fn parameters(&self, function: Id) -> Option<Vec<Id>> {
        let head = self.head(function).filter(|head| head.kind == kind::PROTOTYPE)?;
        (0..head.count).map(|at| word(&self.bytes, head.rest + 8 * at + 4)).collect()
    }

    /// The member of this name, also within nameless structures and unions. Bit fields are none.
    pub fn member(&self, of: Id, name: &str) -> Option<Member> {
        self.member_within(of, name, NESTED)
    }

    fn member_within(&self, of: Id, name: &str, depth: usize) -> Option<Member> {
        let head = self.head(of)?;
        if !matches!(head.kind, kind::STRUCT | kind::UNION) {
            return None;
        }
        for at in (0..head.count).map(|at| head.rest + 12 * at) {
            let (called, of) = (word(&self.bytes, at)?, word(&self.bytes, at + 4)?);
            let bits = word(&self.bytes, at + 8)?;
            let (bits, field) =
                if head.fields { (bits & 0xff_ffff, bits >> 24 != 0) } else { (bits, false) };
            let offset = u64::from(bits / 8);
            let whole = !field && bits.is_multiple_of(8);
            if self.name(called) == Some(name.as_bytes()) {
                return whole.then_some(Member { offset, of });
            }
            if self.name(called) == Some(b"")
                && depth > 0
                && let Shape::Struct(part) = self.shape(of)
                && let Some(found) = self.member_within(part, name, depth - 1)
            {
                return Some(Member { offset: offset + found.offset, ..found });
            }
        }
        None
    }

    /// A type as C has it, for messages.
    pub fn text(&self, id: Id) -> String {
        let Some(head) = self.head(id) else { return "void".into() };
        match head.kind {
            kind::POINTER => match self.shape(head.value) {
                Shape::Pointer(_) => "a pointer to a pointer".into(),
                _ => format!("{} *", self.text(self.resolved(head.value))),
            },
            _ => match self.name(head.name) {
                Some(name) if !name.is_empty() => String::from_utf8_lossy(name).into_owned(),
                _ => "nameless".into(),
            },
        }
    }

    /// Whether a structure has this name.
    pub fn is_called(&self, id: Id, name: &str) -> bool {
        self.head(id).is_some_and(|head| self.is_named(&head, name))
    }

    fn is_named(&self, head: &Head, name: &str) -> bool {
        self.name(head.name) == Some(name.as_bytes())
    }

    fn resolved(&self, id: Id) -> Id {
        self.resolve(id).map_or(0, |(id, _)| id)
    }

    fn resolve(&self, mut id: Id) -> Option<(Id, Head)> {
        for _ in 0..ALIASES {
            let head = self.head(id)?;
            if !alias(head.kind) {
                return Some((id, head));
            }
            id = head.value;
        }
        None
    }

    fn head(&self, id: Id) -> Option<Head> {
        self.head_at(*self.types.get((id as usize).checked_sub(1)?)?)
    }

    fn head_at(&self, at: usize) -> Option<Head> {
        let (name, info, value) =
            (word(&self.bytes, at)?, word(&self.bytes, at + 4)?, word(&self.bytes, at + 8)?);
        Some(Head {
            rest: at + HEAD,
            name,
            kind: info >> 24 & 0x1f,
            count: (info & 0xffff) as usize,
            fields: info >> 31 != 0,
            value,
        })
    }

    fn name(&self, at: u32) -> Option<&[u8]> {
        let names = self.bytes.get(self.names.clone())?.get(at as usize..)?;
        names.split(|byte| *byte == 0).next()
    }
}

/// Whether a kind only gives another type a name, a qualifier or a tag.
fn alias(kind: u32) -> bool {
    use kind::{CONST, RESTRICT, TYPE_TAG, TYPEDEF, VOLATILE};
    matches!(kind, TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(four.try_into().ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Writes descriptions.
    #[derive(Clone, Default)]
    pub struct Writer {
        types: Vec<u8>,
        names: Vec<u8>,
        count: Id,
    }

    impl Writer {
        fn add(&mut self, name: &str, info: u32, value: u32, rest: &[u32]) -> Id {
            for word in [self.name(name), info, value].iter().chain(rest) {
                self.types.extend(word.to_le_bytes());
            }
            self.count += 1;
            self.count
        }

        fn name(&mut self, name: &str) -> u32 {
            if self.names.is_empty() {
                self.names.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let at = self.names.len() as u32;
            self.names.extend(name.as_bytes());
            self.names.push(0);
            at
        }

        pub fn number(&mut self, name: &str, size: u32) -> Id {
            self.add(name, kind::INT << 24, size, &[size * 8])
        }

        pub fn pointer(&mut self, to: Id) -> Id {
            self.add("", kind::POINTER << 24, to, &[])
        }

        pub fn typedef(&mut self, name: &str, of: Id) -> Id {
            self.add(name, kind::TYPEDEF << 24, of, &[])
        }

        /// Members by name, type and offset in bytes.
        pub fn structure(&mut self, name: &str, members: &[(&str, Id, u32)]) -> Id {
            let mut rest = Vec::new();
            for (name, of, offset) in members {
                rest.extend([self.name(name), *of, offset * 8]);
            }
            self.add(name, kind::STRUCT << 24 | members.len() as u32, 64, &rest)
        }

        pub fn function(&mut self, parameters: &[Id]) -> Id {
            let rest: Vec<u32> = parameters.iter().flat_map(|of| [0, *of]).collect();
            self.add("", kind::PROTOTYPE << 24 | parameters.len() as u32, 0, &rest)
        }

        pub fn bytes(&self) -> Vec<u8> {
            let (types, names) = (self.types.len() as u32, self.names.len() as u32);
            let head = [0x01_eb9f, 24, 0, types, types, names];
            let head = head.iter().flat_map(|word: &u32| word.to_le_bytes());
            head.chain(self.types.clone()).chain(self.names.clone()).collect()
        }
    }

    fn sample() -> Vec<u8> {
        let mut writer = Writer::default();
        let int = writer.number("unsigned int", 4);
        let inner = writer.structure("", &[("hidden", int, 4)]);
        let alias = writer.typedef("number_t", int);
        let constant = writer.add("", kind::CONST << 24, alias, &[]);
        let outer = writer.structure("outer", &[("plain", constant, 0), ("", inner, 8)]);
        let pointer = writer.pointer(outer);
        let function = writer.function(&[0, pointer, alias]);
        let pointer = writer.pointer(function);
        writer.typedef("call_t", pointer);
        // A bit field, and a type that names itself.
        let name = writer.name("bit");
        let fields = 1 << 31 | kind::STRUCT << 24 | 1;
        writer.add("fields", fields, 8, &[name, int, 1 << 24 | 8]);
        writer.typedef("ring", writer.count + 1);
        writer.bytes()
    }

    #[test]
    fn members_and_parameters_are_found() {
        let btf = Btf::parse(sample()).unwrap();
        let Shape::Pointer(function) = btf.shape(btf.typedef("call_t").unwrap()) else { panic!() };
        let Shape::Function(function) = btf.shape(function) else { panic!() };
        let parameters = btf.parameters(function).unwrap();
        let texts: Vec<String> = parameters.iter().map(|id| btf.text(*id)).collect();
        assert_eq!(texts, ["void", "outer *", "number_t"]);
        let Shape::Pointer(outer) = btf.shape(parameters[1]) else { panic!() };
        assert!(btf.is_called(outer, "outer") && btf.shape(outer) == Shape::Struct(outer));
        let plain = btf.member(outer, "plain").unwrap();
        assert_eq!((plain.offset, btf.shape(plain.of)), (0, Shape::Number(4)));
        assert_eq!(btf.member(outer, "hidden").unwrap().offset, 12);
        assert_eq!(btf.member(outer, "missing"), None);
        assert_eq!(btf.member(parameters[2], "plain"), None);
        assert_eq!(btf.member(10, "bit"), None);
        assert_eq!(btf.shape(btf.typedef("ring").unwrap()), Shape::Other);
        assert_eq!((btf.shape(0), btf.shape(u32::MAX)), (Shape::Other, Shape::Other));
    }

    #[test]
    fn whatever_the_bytes_are_they_are_read_or_refused() {
        let good = sample();
        assert!(Btf::parse(Vec::new()).is_err());
        assert!((0..good.len()).all(|end| Btf::parse(good[..end].to_vec()).is_err()));
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..random.usize(1..6) {
                let at = random.usize(..bytes.len());
                bytes[at] = [0, 1, 13, 0x7f, 0xff, random.u8(..)][random.usize(..6)];
            }
            let Ok(btf) = Btf::parse(bytes) else { continue };
            for id in 0..14 {
                let (_, _) = (btf.member(id, "hidden"), btf.parameters(id));
                let (_, _) = (btf.text(id), btf.shape(id));
            }
            let _ = btf.typedef("call_t");
        }
    }

    #[test]
    fn a_kind_of_the_future_is_refused_by_its_number() {
        let mut writer = Writer::default();
        writer.add("", 30 << 24, 0, &[]);
        assert!(Btf::parse(writer.bytes()).err().unwrap().contains("kind 30"));
    }
}
