//! A simulated node with one replica: its files, its image, and what they must hold.

use std::{
    cell::RefCell,
    ops::Range,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use uuid::Uuid;

use super::{Mutant, errand::Errand, model::Model};
use crate::{
    cow::{
        Base, Overlay,
        format::{self, BLOCKS_PER_PAGE},
        tail::{self, Memory, Place},
    },
    error::{Error, Kind, Result as IoResult},
    io::{
        Buf, Io,
        sim::{Cut, Faults, Lie, Sim, SimFile},
    },
    units::{BLOCK, Block, SECTOR},
};

pub(super) const ID: Uuid = Uuid::from_u128(0x7573_6572_6c61_7920_6372_6173_6821_2121);

/// The image: what it holds follows from the offset.
#[derive(Clone)]
pub(super) struct Image {
    size: u64,
    /// A file that is read in its place, so that reads take time and can fail.
    file: SimFile,
}

impl Image {
    /// One block in four is zeros, and only every other of those is known to be.
    fn holds_zeros(block: u64) -> bool {
        (block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 62) == 0
    }

    fn byte(&self, offset: u64) -> u8 {
        match offset >= self.size || Image::holds_zeros(offset / BLOCK) {
            true => 0,
            false => (offset / SECTOR * 7 + offset % 251 + 1) as u8,
        }
    }
}

impl Image {
    /// What is left of it for an overlay that needs none.
    pub(super) fn gone(&self) -> Image {
        Image { size: 0, file: self.file }
    }
}

impl Base<Sim> for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_zero(&self, block: Block) -> bool {
        block.0.is_multiple_of(2) && Image::holds_zeros(block.0)
    }

    async fn read(&self, io: &Sim, offset: u64, buf: Buf) -> IoResult<()> {
        if offset + buf.len() as u64 > self.size {
            return Err(Error::new(Kind::OutOfRange, "the image is read past its end"));
        }
        let read = io.read(&self.file, buf.slice(0..0), 0).await;
        read.map_err(|error| Error::io("image", error))?;
        let bytes: Vec<u8> = (offset..offset + buf.len() as u64).map(|at| self.byte(at)).collect();
        buf.copy_from(&bytes);
        Ok(())
    }
}

/// What the catalogue says of the replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Catalogue {
    /// The number of its place.
    pub(super) place: u8,
    /// 1 if it needs no image.
    pub(super) flat: u8,
}

pub(super) struct Node {
    pub(super) sim: Sim,
    data: SimFile,
    map: SimFile,
    /// Where the catalogue is.
    pub(super) catalogue: SimFile,
    known: Catalogue,
    /// What was begun and may have ended before the crash.
    errand: Option<Errand>,
    pub(super) mutant: Option<Mutant>,
    pub(super) image: Image,
    /// Bytes that guests touch.
    pub(super) areas: Vec<Range<u64>>,
    pub(super) model: Rc<RefCell<Model>>,
    /// The sizes that the replica may have after a crash; the last is what was found or asked for
    /// last.
    pub(super) sizes: Rc<RefCell<Vec<u64>>>,
    faulty: bool,
    /// Where the replica's tail is kept, if it is.
    pub(super) tail: Option<Place>,
    /// There is more memory for the tail than guests can fill: nothing but a failed sync voids it.
    roomy: bool,
    /// Syncs that had failed when it was last recovered: a later one voids the tail.
    failed_syncs: u64,
    /// The tail does not outlive the process, whatever it says.
    forgetful: bool,
    /// The tail says that it holds, whatever is missing.
    boastful: bool,
}

/// Memory of which there is little: a tail in it runs over, or can't be written everywhere.
struct Scarce {
    words: Box<[AtomicU64]>,
    /// Words for which there is no memory.
    missing: Range<usize>,
}

impl Scarce {
    fn new(words: usize, missing: Range<usize>) -> Scarce {
        Scarce { words: (0..words).map(|_| AtomicU64::new(0)).collect(), missing }
    }

    /// Memory for a tail of `runs` runs.
    fn of(runs: usize) -> Scarce {
        Scarce::new(tail::HEAD + runs * tail::RUN, 0..0)
    }

    fn copy(place: &Place) -> Place {
        let words = place.memory.words().iter();
        let words = words.map(|word| AtomicU64::new(word.load(Ordering::Relaxed))).collect();
        Place { memory: Arc::new(Scarce { words, missing: 0..0 }), boot: place.boot }
    }

    fn random(rng: &mut fastrand::Rng) -> Scarce {
        let words = tail::HEAD + rng.usize(1..12) * tail::RUN;
        let missing = if rng.u8(0..3) == 0 { rng.usize(tail::HEAD..words) } else { words };
        Scarce::new(words, missing..(missing + rng.usize(0..20)).min(words))
    }
}

impl Memory for Scarce {
    fn words(&self) -> &[AtomicU64] {
        &self.words
    }

    fn reserve(&self, word: usize) -> bool {
        !self.missing.contains(&word)
    }
}

/// How a node is laid out.
pub(super) struct Layout {
    pub(super) seed: u64,
    pub(super) size: u64,
    pub(super) image: u64,
    pub(super) records: u32,
    pub(super) align: (u64, u64),
    pub(super) areas: Vec<Range<u64>>,
}

impl Node {
    pub(super) fn new(layout: Layout) -> Node {
        let sim = Sim::new(layout.seed);
        let image = Image { size: layout.image, file: sim.create(1, &[], 0) };
        let data = sim.create(layout.align.0, &[], layout.size);
        let map = sim.create(layout.align.1, &format::blank(ID, layout.size, layout.records), 0);
        let catalogue = sim.create(1, &[], SECTOR);
        let model = Model::new(&layout.areas, |sector| {
            let mut bytes = [0; SECTOR as usize];
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = image.byte(sector * SECTOR + i as u64);
            }
            bytes
        });
        Node {
            sim,
            data,
            map,
            catalogue,
            known: Catalogue::default(),
            errand: None,
            mutant: None,
            image,
            areas: layout.areas,
            model: Rc::new(RefCell::new(model)),
            sizes: Rc::new(RefCell::new(vec![layout.size])),
            faulty: false,
            tail: None,
            roomy: true,
            failed_syncs: 0,
            forgetful: false,
            boastful: false,
        }
    }

    /// Keeps a tail, in memory for `runs` runs.
    pub(super) fn keep_tail(&mut self, runs: usize) {
        self.roomy = false;
        let memory = Arc::new(Scarce::of(runs));
        self.tail = Some(Place { memory, boot: Uuid::from_u128(1) });
    }

    /// A node of random layout: small devices, or large ones of which guests touch the places
    /// where bitmap pages and their groups meet.
    pub(super) fn random(rng: &mut fastrand::Rng, mutant: Option<Mutant>) -> Node {
        let page = BLOCKS_PER_PAGE * BLOCK;
        let (size, areas) = match rng.u8(0..3) {
            0 => {
                let size = rng.u64(1..=2) * 64 * page + rng.u64(8..64) * SECTOR;
                let near = |at: u64| at - 3 * BLOCK..(at + 3 * BLOCK).min(size);
                (size, vec![0..4 * BLOCK, near(page), near(64 * page), size - 5 * SECTOR..size])
            }
            _ => {
                let size = rng.u64(1..=40 * 8) * SECTOR;
                (size, Vec::from_iter([Range { start: 0, end: size + 8 * BLOCK }]))
            }
        };
        let aligns = [1, 512, 4096];
        let seed = rng.u64(..);
        let mut node = Node::new(Layout {
            seed,
            size,
            image: if rng.bool() { rng.u64(0..=size) } else { rng.u64(0..size + 9 * BLOCK) },
            records: if rng.u8(0..4) == 0 { 64 } else { rng.u32(2..6) },
            align: (aligns[rng.usize(0..3)], aligns[rng.usize(0..3)]),
            areas,
        });
        if rng.bool() {
            node.sim.set_torn_sectors(node.map);
        }
        if rng.u8(0..3) > 0 || mutant == Some(Mutant::BoastfulTail) {
            let mut own = fastrand::Rng::with_seed(seed);
            node.roomy = own.bool() && mutant != Some(Mutant::BoastfulTail);
            let memory = match mutant {
                Some(Mutant::BoastfulTail) => Scarce::of(own.usize(1..4)),
                _ if node.roomy => Scarce::new(tail::BYTES / 8, 0..0),
                _ => Scarce::random(&mut own),
            };
            node.tail = Some(Place { memory: Arc::new(memory), boot: Uuid::from_u128(1) });
        }
        node.mutant = mutant;
        match mutant {
            Some(Mutant::UnsyncedMap) => node.sim.set_lie(node.map, Lie::Sync),
            Some(Mutant::UnsyncedData) => node.sim.set_lie(node.data, Lie::Sync),
            Some(Mutant::ForgetfulTail) => node.forgetful = true,
            Some(Mutant::BoastfulTail) => node.boastful = true,
            _ => {}
        }
        node
    }

    /// The same node, to go another way from here.
    pub(super) fn fork(&self, seed: u64) -> Node {
        Node {
            sim: self.sim.fork(seed),
            data: self.data,
            map: self.map,
            catalogue: self.catalogue,
            known: self.known,
            errand: self.errand,
            mutant: self.mutant,
            image: self.image.clone(),
            areas: self.areas.clone(),
            model: Rc::new(RefCell::new(self.model.borrow().clone())),
            sizes: Rc::new(RefCell::new(self.sizes.borrow().clone())),
            faulty: self.faulty,
            tail: self.tail.as_ref().map(Scarce::copy),
            roomy: self.roomy,
            failed_syncs: self.failed_syncs,
            forgetful: self.forgetful,
            boastful: self.boastful,
        }
    }

    pub(super) fn set_faults(&mut self, faults: Faults) {
        self.faulty = true;
        self.sim.set_faults(faults);
    }

    pub(super) fn is_faulty(&self) -> bool {
        self.faulty
    }

    /// Whether the data file is, or the one that it moves to.
    pub(super) fn is_buffered(&self) -> bool {
        let buffered = |file| self.sim.align(file) == 1;
        buffered(&self.data)
            || matches!(&self.errand, Some(Errand::Move { data, .. }) if buffered(data))
    }

    /// What is to be done to the replica while guests use it, sometimes.
    pub(super) fn errand(&mut self, rng: &mut fastrand::Rng) -> Option<Errand> {
        let number = rng.u8(0..8);
        let size = self.sizes.borrow().last().copied().unwrap_or_default();
        let wanted = match self.mutant {
            Some(Mutant::UnsyncedTarget | Mutant::OpenGate | Mutant::EarlySwitch) => number < 6,
            _ => number < 3,
        };
        self.errand = None;
        if !wanted {
            return None;
        }
        if number > 0 {
            let aligns = [1, 512, 4096];
            let align = (aligns[rng.usize(0..3)], aligns[rng.usize(0..3)]);
            let records = if rng.bool() { format::RECORDS } else { rng.u32(2..6) };
            return Some(self.plan_move(align, records));
        }
        // What a device shows of its image when it grows later would be gone: none is smaller.
        (self.image.size <= size.min(1 << 20)).then(|| self.plan_flatten())
    }

    /// The replica is to move to new files.
    pub(super) fn plan_move(&mut self, align: (u64, u64), records: u32) -> Errand {
        let size = self.sizes.borrow().last().copied().unwrap_or_default();
        let data = self.sim.create(align.0, &[], size);
        let map = self.sim.create(align.1, &format::blank(ID, size, records), 0);
        if self.mutant == Some(Mutant::UnsyncedTarget) {
            self.sim.set_lie(data, Lie::Sync);
        }
        let place = self.known.place.wrapping_add(1);
        let then = Catalogue { place, ..self.known };
        *self.errand.insert(Errand::Move { data, map, then })
    }

    /// The replica is to need its image no longer.
    pub(super) fn plan_flatten(&mut self) -> Errand {
        *self.errand.insert(Errand::Flatten { then: Catalogue { flat: 1, ..self.known } })
    }

    /// Finds out where the replica is, as the scan of a catalogue does.
    fn find(&mut self) -> Result<(), String> {
        let bytes = self.sim.peek(self.catalogue);
        let found = Catalogue { place: bytes[0], flat: bytes[1] };
        if found == self.known {
            return Ok(());
        }
        // What is seen after a kill is not durable because it is seen.
        if !matches!(self.sim.run_one(self.sim.sync(&self.catalogue), None), Some(Ok(()))) {
            return Err("the catalogue can't be synced".to_owned());
        }
        match self.errand {
            Some(Errand::Move { data, map, then }) if then == found => {
                (self.data, self.map) = (data, map);
            }
            Some(Errand::Flatten { then }) if then == found => self.image = self.image.gone(),
            _ => return Err(format!("the catalogue says {found:?}")),
        }
        self.known = found;
        Ok(())
    }

    /// Opens the replica; `None` if the disk was made to fail.
    pub(super) fn open(&self) -> Result<Option<Arc<Overlay<Sim>>>, String> {
        let opened = self
            .sim
            .run_one(Overlay::open(&self.sim, self.data, self.map, ID, self.tail.clone()), None);
        match opened {
            Some(Ok(overlay)) => Ok(Some(Arc::new(overlay))),
            Some(Err(error)) if self.faulty && error.kind() == Kind::Io => Ok(None),
            Some(Err(error)) => Err(format!("opening: {error}")),
            None => Err("opening never ends".to_owned()),
        }
    }

    /// Opens the replica, and stops after some steps.
    pub(super) fn open_for(&self, steps: u64) -> Result<Option<Arc<Overlay<Sim>>>, String> {
        let open = Overlay::open(&self.sim, self.data, self.map, ID, self.tail.clone());
        self.sim.run_one(open, Some(steps));
        Ok(None)
    }

    /// Cuts the power, and checks what is found then.
    pub(super) fn power_cut(&mut self, cut: Cut) -> Result<(), String> {
        self.sim.power_cut(cut);
        // The memory stays as it was, and belongs to a boot that is no more.
        if let Some(place) = &mut self.tail {
            place.boot = Uuid::from_u128(place.boot.as_u128() + 1);
        }
        self.recover(|model, offset, bytes| model.check_cut(offset, bytes))?;
        let size = self.sizes.borrow().last().copied();
        self.model.borrow_mut().hide(size.unwrap_or_default());
        *self.sizes.borrow_mut() = Vec::from_iter(size);
        Ok(())
    }

    /// Kills the process, and checks what is found then.
    pub(super) fn kill(&mut self) -> Result<(), String> {
        self.sim.kill();
        let sound = self.sim.failed_syncs() == self.failed_syncs;
        let (mut kept, mut unheard) = (false, false);
        if let Some(place) = &self.tail {
            let words = place.memory.words();
            if self.boastful {
                words[tail::AT_VALID].store(1, Ordering::Relaxed);
            }
            kept = sound && place.holds();
            // A sync failed, took what it covered, and the process died before it heard of it.
            unheard = !sound && place.holds();
            // Nobody may have come as far as to keep anything.
            let begun = words[tail::AT_MAGIC].load(Ordering::Relaxed) != 0;
            if begun && sound && self.roomy && !kept {
                return Err("the tail is void, and had room".to_owned());
            }
            if self.forgetful {
                words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
            }
        }
        self.recover(|model, offset, bytes| match kept {
            true => model.check_death(offset, bytes),
            false if unheard => {
                model.take(offset, bytes);
                Ok(())
            }
            false => model.check_kill(offset, bytes),
        })
    }

    fn recover(
        &mut self,
        check: impl Fn(&mut Model, u64, &[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        self.faulty = false;
        self.sim.set_faults(Faults::default());
        self.model.borrow_mut().end_all();
        self.find()?;
        let before = self.sim.changes();
        let Some(overlay) = self.open()? else { return Err("the disk is sound".to_owned()) };
        let size = overlay.size();
        if !self.sizes.borrow().contains(&size) {
            return Err(format!("the size is {size}, not one of {:?}", self.sizes.borrow()));
        }
        // What is found is not durable because it is there: after a kill it may shrink again.
        self.sizes.borrow_mut().push(size);
        for (offset, bytes) in self.contents(&overlay)? {
            check(&mut self.model.borrow_mut(), offset, &bytes)?;
        }
        self.failed_syncs = self.sim.failed_syncs();
        match self.sim.changes() == before {
            true => Ok(()),
            false => Err("recovery or a read has written".to_owned()),
        }
    }

    /// What the areas hold, read through the overlay.
    pub(super) fn contents(&self, overlay: &Overlay<Sim>) -> Result<Vec<(u64, Vec<u8>)>, String> {
        let mut contents = Vec::new();
        for area in &self.areas {
            let end = area.end.min(overlay.size());
            if end <= area.start {
                continue;
            }
            let buf = Buf::heap((end - area.start) as usize);
            let read = overlay.read(&self.sim, &self.image, area.start, buf.clone());
            match self.sim.run_one(read, None) {
                Some(Ok(())) => contents.push((area.start, buf.to_vec())),
                Some(Err(error)) => return Err(format!("reading: {error}")),
                None => return Err("a read never ends".to_owned()),
            }
        }
        Ok(contents)
    }
}
