//! Invariants checked: the bytes are those of docs/FORMAT.md (the fixture was made from it by other
//! code); what is damaged is never decoded to something else; nothing makes the decoder panic.

use super::*;

const ID: Uuid = Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
const GOLDEN: &[u8] = include_bytes!("../../../tests/fixtures/map-v1.bin");

fn superblock(generation: u64) -> Superblock {
    Superblock { id: ID, generation, size: (3 << 30) + 512, records: 64, pages: 2, session: 0 }
}

fn record() -> Record {
    let run = |start, len, state| Run { start, len, state };
    Record {
        id: ID,
        generation: 7,
        sequence: 3,
        first: 2,
        runs: vec![
            run(0, 1, State::Data),
            run((1 << 40) - 1, MAX_RUN, State::Zero),
            run(BLOCKS_PER_PAGE, 250, State::Data),
        ],
    }
}

fn page() -> Box<[u64; WORDS]> {
    let mut states = Box::new([0; WORDS]);
    states[0] = 0b01 | 0b10 << 2 | 0b01 << 62;
    states[1] = 0b10;
    states[WORDS - 1] = 0b01 << 62;
    states
}

#[test]
fn bytes_are_those_of_version_1() {
    assert_eq!(superblock(7).encode(), GOLDEN[..4096]);
    assert_eq!(record().encode(), GOLDEN[4096..8192]);
    assert_eq!(encode_page(ID, 1, &page()), GOLDEN[8192..]);

    assert_eq!(Superblock::decode(&GOLDEN[..4096], 1, ID).expect("intact"), superblock(7));
    assert_eq!(Record::decode(&GOLDEN[4096..8192]), Some(record()));
    let states = decode_page(ID, 1, units::blocks(3 << 30), &GOLDEN[8192..]).expect("intact");
    assert_eq!(states, Some(page()));
}

#[test]
fn one_flipped_bit_harms_no_superblock_and_no_record() {
    let (slot, entry) = (superblock(7).encode(), record().encode());
    for bit in 0..PAGE * 8 {
        let flip = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        };
        assert_eq!(Superblock::decode(&flip(&slot), 1, ID).expect("seven others"), superblock(7));
        assert_eq!(Record::decode(&flip(&entry)), Some(record()));
    }
}

#[test]
fn one_flipped_bit_shows_in_a_page() {
    let bytes = encode_page(ID, 1, &page());
    for bit in 0..PAGE * 8 {
        let mut bytes = bytes;
        bytes[bit / 8] ^= 1 << (bit % 8);
        let error = decode_page(ID, 1, 1 << 20, &bytes).expect_err("it is damaged");
        assert_eq!(error.kind(), Kind::Corrupt);
    }
    assert!(decode_page(ID, 2, 1 << 20, &bytes).is_err(), "another page");
    assert!(decode_page(Uuid::nil(), 1, 1 << 20, &bytes).is_err(), "another overlay");
    assert!(decode_page(ID, 1, 2 * BLOCKS_PER_PAGE - 1, &bytes).is_err(), "past the end");
    assert!(decode_page(ID, 1, 2 * BLOCKS_PER_PAGE, &bytes).is_ok());
}

#[test]
fn the_fourth_state_is_refused() {
    let mut states = page();
    states[5] = 0b11 << 10;
    let bytes = encode_page(ID, 1, &states);
    assert!(decode_page(ID, 1, 1 << 20, &bytes).is_err());
}

#[test]
fn a_torn_superblock_is_the_old_or_the_new() {
    let (old, new) = (superblock(7).encode(), superblock(9).encode());
    for mask in 0..256usize {
        let torn: Vec<u8> = (0..8)
            .flat_map(|i| {
                let from = if mask >> i & 1 == 1 { &new } else { &old };
                from[i * 512..(i + 1) * 512].to_vec()
            })
            .collect();
        let generation = if mask == 0 { 7 } else { 9 };
        assert_eq!(Superblock::decode(&torn, 1, ID).expect("intact").generation, generation);
    }
}

#[test]
fn other_versions_are_refused_by_name() {
    let mut bytes = superblock(7).encode();
    for copy in bytes.chunks_exact_mut(512) {
        put32(copy, SB_VERSION, 2);
    }
    let error = Superblock::decode(&bytes, 1, ID).expect_err("of the future");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("version 2"), "{error}");
}

#[test]
fn absurd_superblocks_are_refused() {
    let wrong = |change: &dyn Fn(&mut Superblock)| {
        let mut superblock = superblock(7);
        change(&mut superblock);
        Superblock::decode(&superblock.encode(), 1, ID).map_err(|error| error.kind())
    };
    assert_eq!(wrong(&|s| s.id = Uuid::nil()), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.generation = 8), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.generation = u64::MAX), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.size = 0), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.size = 513), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.size = MAX_SIZE + 512), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.records = 1), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.records = u32::MAX), Err(Kind::Corrupt));
    assert_eq!(wrong(&|s| s.pages = 1000), Err(Kind::Corrupt));
    assert!(wrong(&|_| ()).is_ok());
}

#[test]
fn garbage_is_never_decoded() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut bytes = vec![0; PAGE];
    for _ in 0..2000 {
        rng.fill(&mut bytes);
        if rng.bool() {
            // The right magics in front of it.
            for at in (0..PAGE).step_by(COPY) {
                bytes[at..at + 12].copy_from_slice(b"UNDERMAP\x01\0\0\0");
            }
        } else if rng.bool() {
            for at in [0, HALF] {
                bytes[at..at + 4].copy_from_slice(RECORD_MAGIC);
            }
        }
        assert!(Superblock::decode(&bytes, 0, ID).is_err());
        assert_eq!(Record::decode(&bytes), None);
        assert!(decode_page(ID, 0, 1 << 30, &bytes).is_err());
    }
}

#[test]
fn records_hold_what_they_can_and_no_nonsense() {
    let run = |len, state| Run { start: 9, len, state };
    let full = Record { runs: vec![run(1, State::Zero); RUNS_PER_RECORD], ..record() };
    assert_eq!(Record::decode(&full.encode()), Some(full));
    for nonsense in [run(0, State::Data), run(1, State::Base)] {
        assert_eq!(Record::decode(&Record { runs: vec![nonsense], ..record() }.encode()), None);
    }
}

#[test]
fn every_page_has_a_place_of_its_own() {
    let layout = Layout { records: 5 };
    let mut last = layout.bitmap();
    for group in 0..20 {
        for area in 0..2 {
            for page in group * 64..(group + 1) * 64 {
                let offset = layout.page(area, page);
                assert_eq!(offset, last);
                assert_eq!(layout.page_at(offset), (area, page));
                last += PAGE as u64;
            }
        }
    }
    assert_eq!(layout.end(20 * 64 * BLOCKS_PER_PAGE * BLOCK), last);
    assert_eq!(layout.end((20 * 64 - 1) * BLOCKS_PER_PAGE * BLOCK), last);
    assert!(blank(ID, 1 << 40, RECORDS).len() < 512 << 10);
}
