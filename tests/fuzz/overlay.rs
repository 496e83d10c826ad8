//! A replica's map: superblocks, journal and bitmap pages of an overlay that was worn, spoilt, and in most cases
//! given the checksums that would make them right. It opens or it is refused as corrupt; what opens can be read,
//! written, flushed and opened again, and holds what it held or what was written.

use fastrand::Rng;
use underlay::{
    Kind, Result,
    cow::{Base, Overlay, Provision, format},
    io::{
        Buf, Io,
        sim::{Cut, Sim, SimFile},
    },
    units::Block,
};
use uuid::Uuid;

use crate::{
    Case,
    mutator::{checksum, scribble},
};

const ID: Uuid = Uuid::from_u128(42);
const BLOCK: u64 = 4096;
const SIZE: u64 = 24 * BLOCK;
const PAGE: usize = format::PAGE;

/// An image of which every byte is its block's number.
struct Image;

impl<I: Io> Base<I> for Image {
    fn size(&self) -> u64 {
        10 * BLOCK + 700
    }

    fn is_zero(&self, block: Block) -> bool {
        block.0.is_multiple_of(4)
    }

    async fn read(&self, _: &I, offset: u64, buf: Buf) -> Result<()> {
        let end = offset + buf.len() as u64;
        assert!(end <= Base::<I>::size(self), "the image is not read past its end");
        buf.copy_from(&(offset..end).map(|at| (at / BLOCK) as u8).collect::<Vec<u8>>());
        Ok(())
    }
}

/// A disk after a crash: a checkpoint, records behind it, a page in each area.
struct Worn {
    sim: Sim,
    data: SimFile,
    map: Vec<u8>,
}

fn run<T>(sim: &Sim, task: impl Future<Output = T>) -> T {
    sim.run_one(task, Some(100_000)).expect("it ends")
}

fn worn() -> Worn {
    let sim = Sim::new(7);
    let data = sim.create(512, &[], SIZE);
    let map = sim.create(4096, &format::blank(ID, SIZE, 4), 0);
    let overlay = run(&sim, Overlay::open(&sim, data, map, ID, None)).unwrap();
    for round in 0..8 {
        let at = round * 2 * BLOCK;
        let bytes = Buf::from_bytes(&vec![round as u8 + 100; 5000]);
        run(&sim, overlay.write(&sim, &Image, at, bytes)).unwrap();
        let zeroed = overlay.write_zeroes(&sim, &Image, at + BLOCK, BLOCK, Provision::Release);
        run(&sim, zeroed).unwrap();
        run(&sim, overlay.flush(&sim)).unwrap();
    }
    drop(overlay);
    sim.power_cut(Cut::LoseAll);
    Worn { data, map: sim.peek(map), sim }
}

pub fn start() -> Case {
    let worn = worn();
    let used: Vec<usize> = (0..worn.map.len() / PAGE)
        .filter(|page| worn.map[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0))
        .collect();
    Box::new(move |rng| case(&worn, &used, rng))
}

fn case(worn: &Worn, used: &[usize], rng: &mut Rng) {
    let mut map = worn.map.clone();
    for _ in 0..rng.usize(1..4) {
        let number = used[rng.usize(..used.len())];
        let page = &mut map[number * PAGE..][..PAGE];
        // Copies within a page are spoilt alike, or one of them only.
        let copy = [PAGE, PAGE / 2, 512][rng.usize(..3)];
        if rng.u8(..12) == 0 {
            let other = used[rng.usize(..used.len())];
            map.copy_within(other * PAGE..(other + 1) * PAGE, number * PAGE);
        } else if rng.u8(..4) == 0 {
            scribble(rng, page);
        } else {
            let most = copy.min(100 + rng.usize(..PAGE));
            scribble(rng, &mut page[..most]);
            let first = page[..copy].to_vec();
            page.chunks_mut(copy).for_each(|other| other.copy_from_slice(&first));
        }
        if rng.u8(..8) != 0 {
            seal(number, &mut map[number * PAGE..][..PAGE]);
        }
    }
    if rng.u8(..20) == 0 {
        map.truncate(rng.usize(..=map.len()));
    }
    let sim = worn.sim.fork(rng.u64(..));
    let map = sim.create(4096, &map, 0);
    let overlay = match run(&sim, Overlay::open(&sim, worn.data, map, ID, None)) {
        Ok(overlay) => overlay,
        Err(error) => {
            let expected = matches!(error.kind(), Kind::Corrupt | Kind::Unsupported);
            assert!(expected && error.to_string().contains(&ID.to_string()), "{error}");
            return;
        }
    };
    use_it(&sim, &overlay, rng);
    let size = overlay.size();
    drop(overlay);
    sim.power_cut(Cut::LoseAll);
    let overlay = run(&sim, Overlay::open(&sim, worn.data, map, ID, None)).expect("it was flushed");
    assert_eq!(overlay.size(), size);
    let first = Buf::heap(600);
    run(&sim, overlay.read(&sim, &Image, 0, first.clone())).unwrap();
    assert_eq!(first.to_vec(), [1; 600]);
}

fn use_it(sim: &Sim, overlay: &Overlay<Sim>, rng: &mut Rng) {
    let size = overlay.size();
    // A map that says so makes the replica larger: its data file is a hole there.
    for offset in [0, size.saturating_sub(SIZE), rng.u64(..size)] {
        let len = (size - offset).min(SIZE);
        let extents = overlay.extents(&Image, offset, len).unwrap().take(100);
        assert!(extents.map(|extent| extent.len).sum::<u64>() <= len);
        let buf = Buf::heap(len as usize);
        // A block that the map takes for data may lie behind the end of the file.
        let _ = run(sim, overlay.read(sim, &Image, offset, buf));
    }
    let at = rng.u64(..size.min(SIZE) - 512);
    let _ = run(sim, overlay.discard(sim, at, 512));
    run(sim, overlay.write_zeroes(sim, &Image, at, 512, Provision::Keep)).unwrap();
    run(sim, overlay.write(sim, &Image, 0, Buf::from_bytes(&[1; 600]))).unwrap();
    run(sim, overlay.flush(sim)).unwrap();
}

/// Gives a page the checksums that it needs: `docs/FORMAT.md`.
fn seal(number: usize, page: &mut [u8]) {
    let layout = format::Layout { records: 4 };
    if number < 2 {
        page.chunks_mut(512).for_each(|copy| checksum(copy, 12));
    } else if (number * PAGE) < layout.bitmap() as usize {
        page.chunks_mut(PAGE / 2).for_each(|half| checksum(half, 4));
    } else {
        let mut states = [0; format::WORDS];
        for (state, bytes) in states.iter_mut().zip(page.chunks_exact(8)) {
            *state = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        let (_, index) = layout.page_at((number * PAGE) as u64);
        page.copy_from_slice(&format::encode_page(ID, index, &states));
    }
}
