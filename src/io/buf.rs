//! Aligned memory that the kernel reads and writes while nobody looks.
//!
//! A [`Buf`] is a window on a slot of memory; windows may be split and cloned, and the slot returns
//! to its [`Pool`] with the last of them. An operation in flight holds a window, so memory that the
//! kernel may still touch is never given back. Content is reached by copying only: no reference
//! into a slot exists, hence none can be invalidated by the kernel's writes.
//!
//! A window may also be on memory that the kernel lends ([`Loan`]): the same to the ring, and copies
//! go through the kernel.
//!
//! Buffers belong to the thread that made them.
//!
//! Where assertions are compiled in, a slot that nobody holds is filled with a pattern, lies idle for as
//! long as others are free, and is looked at when it is taken again: who writes to memory that was given
//! back is found.

use std::{
    alloc::{self, Layout},
    cell::RefCell,
    collections::VecDeque,
    fmt,
    ops::Range,
    ptr::NonNull,
    rc::{Rc, Weak},
};

use super::loan::Loan;
use crate::units::BLOCK;

/// Alignment of every slot, in bytes: enough for direct I/O on any device.
const ALIGN: usize = BLOCK as usize;

/// The slots a pool keeps: (bytes of one, how many). 20 MiB in all.
const CLASSES: [(usize, usize); 5] =
    [(4 << 10, 256), (16 << 10, 64), (64 << 10, 32), (256 << 10, 32), (512 << 10, 16)];

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// The number of the pool's region in its ring's table of buffers.
pub(super) const POOL: u16 = 0;

/// What a slot is filled with while nobody holds it, where that is looked after.
const IDLE: u8 = 0xdb;

/// Bytes that are copied at a time between two places that the processor can't both see.
const COPY: usize = 4 << 10;

/// One allocation; freed with the last slot in it.
struct Region {
    ptr: NonNull<u8>,
    len: usize,
    /// Whether the thread's ring has it registered.
    registered: bool,
}

impl Region {
    fn new(len: usize) -> Region {
        let layout = layout(len);
        // SAFETY: `layout` never has size 0.
        let Some(ptr) = NonNull::new(unsafe { alloc::alloc(layout) }) else {
            alloc::handle_alloc_error(layout)
        };
        if layout.align() == HUGE {
            // SAFETY: the memory is ours; advice changes no content. Without huge pages it is slower.
            unsafe { libc::madvise(ptr.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the memory is valid for `len` bytes.
        unsafe { ptr.as_ptr().write_bytes(0, len) };
        Region { ptr, len, registered: false }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `new` allocated the memory with this layout; every slot in it is gone.
        unsafe { alloc::dealloc(self.ptr.as_ptr(), layout(self.len)) };
    }
}

/// What a window is on.
#[derive(Clone)]
enum Memory {
    Own(Rc<Slot>),
    Lent(Rc<Loan>),
}

struct Slot {
    region: Rc<Region>,
    /// Where the slot starts in its region.
    offset: usize,
    /// The pool it returns to and its number there; `None` for memory of its own.
    home: Option<(Weak<Shared>, usize)>,
}

impl Slot {
    fn bytes(&self) -> *mut u8 {
        // SAFETY: the slot lies within its region, by construction.
        unsafe { self.region.ptr.as_ptr().add(self.offset) }
    }

    /// Fills it, all of its `len` bytes: nobody holds it any more.
    fn retire(&self, len: usize) {
        // SAFETY: the slot is valid for its length, and nobody holds a reference into it.
        unsafe { self.bytes().write_bytes(IDLE, len) };
    }

    /// Whether it is as it was retired.
    fn is_idle(&self, len: usize) -> bool {
        // SAFETY: the slot is valid for its length; nobody holds it, so that nobody writes to it.
        let bytes = unsafe { std::slice::from_raw_parts(self.bytes(), len) };
        bytes.chunks(ALIGN).all(|page| page == &[IDLE; ALIGN][..page.len()])
    }
}

/// The memory of `len` bytes: regions of many slots lie on huge pages, so that a transfer is one run
/// of physical memory for the device, and not one a page.
fn layout(len: usize) -> Layout {
    let align = if len >= HUGE { HUGE } else { ALIGN };
    Layout::from_size_align(len.max(1), align).expect("buffer lengths are bounded by the callers")
}

/// A window on aligned memory, cheap to clone and to split.
#[derive(Clone)]
pub struct Buf {
    memory: Memory,
    start: usize,
    len: usize,
}

impl Buf {
    /// Memory of its own, zeroed, outside any pool.
    pub fn heap(len: usize) -> Buf {
        let region = Rc::new(Region::new(len));
        let slot = Slot { region, offset: 0, home: None };
        Buf { memory: Memory::Own(Rc::new(slot)), start: 0, len }
    }

    /// The first `len` bytes of what the kernel lends.
    pub fn lent(loan: &Rc<Loan>, len: usize) -> Buf {
        Buf { memory: Memory::Lent(loan.clone()), start: 0, len }
    }

    /// Memory of its own that holds a copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> Buf {
        let buf = Buf::heap(bytes.len());
        buf.copy_from(bytes);
        buf
    }

    /// Bytes in the window.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A window on `range` of this one.
    ///
    /// # Panics
    /// If the range does not lie within this window.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Buf {
        assert!(range.start <= range.end && range.end <= self.len, "window within its buffer");
        Buf { memory: self.memory.clone(), start: self.start + range.start, len: range.len() }
    }

    /// The first byte's address; in lent memory the distance from its start, which is what the
    /// kernel takes for one there. Whoever hands it to the kernel keeps a clone of the window until
    /// the kernel is done.
    pub fn as_ptr(&self) -> *mut u8 {
        match &self.memory {
            // SAFETY: the window lies within its slot, by construction.
            Memory::Own(slot) => unsafe { slot.bytes().add(self.start) },
            Memory::Lent(_) => std::ptr::without_provenance_mut(self.start),
        }
    }

    /// The number of the registered buffer that it is part of, in the thread's ring.
    pub fn registered(&self) -> Option<u16> {
        match &self.memory {
            Memory::Own(slot) => slot.region.registered.then_some(POOL),
            Memory::Lent(loan) => Some(loan.index()),
        }
    }

    /// Whether the memory is lent: the processor sees it by way of the kernel only.
    pub fn is_lent(&self) -> bool {
        matches!(self.memory, Memory::Lent(_))
    }

    /// Whether the memory was lent, and a copy from or to it failed: what was copied is void.
    pub fn is_lost(&self) -> bool {
        match &self.memory {
            Memory::Own(_) => false,
            Memory::Lent(loan) => loan.is_lost(),
        }
    }

    /// Copies `bytes` to the start of the window.
    ///
    /// # Panics
    /// If the window is shorter.
    pub fn copy_from(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len, "bytes fit the buffer");
        match &self.memory {
            // SAFETY: the window is valid for its length, and nobody holds a reference into it.
            Memory::Own(_) => unsafe { self.as_ptr().copy_from(bytes.as_ptr(), bytes.len()) },
            Memory::Lent(loan) => loan.put(self.start, bytes),
        }
    }

    /// Copies the first `bytes.len()` bytes of the window out.
    ///
    /// # Panics
    /// If the window is shorter.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.len, "bytes lie in the buffer");
        match &self.memory {
            // SAFETY: the window is valid for its length, and nobody holds a reference into it.
            Memory::Own(_) => unsafe { bytes.as_mut_ptr().copy_from(self.as_ptr(), bytes.len()) },
            Memory::Lent(loan) => loan.take(self.start, bytes),
        }
    }

    /// Copies all of `other` to the start of this window; the two may overlap.
    ///
    /// # Panics
    /// If this window is shorter.
    pub fn copy_from_buf(&self, other: &Buf) {
        assert!(other.len <= self.len, "bytes fit the buffer");
        match (&self.memory, &other.memory) {
            (Memory::Own(_), Memory::Own(_)) => {
                // SAFETY: both windows are valid for `other.len` bytes; `copy` allows overlap.
                unsafe { self.as_ptr().copy_from(other.as_ptr(), other.len) };
            }
            (Memory::Own(_), Memory::Lent(loan)) => {
                // SAFETY: the window is valid for `other.len` bytes, and nobody else holds a
                // reference into it while the kernel fills it.
                let bytes = unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), other.len) };
                loan.take(other.start, bytes);
            }
            (Memory::Lent(_), _) => {
                // Through a copy: the kernel may write to the source meanwhile.
                for at in (0..other.len).step_by(COPY) {
                    let mut bytes = [0; COPY];
                    let bytes = &mut bytes[..COPY.min(other.len - at)];
                    other.slice(at..other.len).copy_to(bytes);
                    self.slice(at..self.len).copy_from(bytes);
                }
            }
        }
    }

    /// Sets every byte of the window.
    pub fn fill(&self, byte: u8) {
        match &self.memory {
            // SAFETY: the window is valid for its length, and nobody holds a reference into it.
            Memory::Own(_) => unsafe { self.as_ptr().write_bytes(byte, self.len) },
            Memory::Lent(loan) => loan.fill(self.start, byte, self.len),
        }
    }

    /// The window's content.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(&mut bytes);
        bytes
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        // The pool keeps one clone of each of its slots: two left means that this is the last window.
        if let Memory::Own(slot) = &self.memory
            && let Some((home, index)) = &slot.home
            && Rc::strong_count(slot) == 2
            && let Some(pool) = home.upgrade()
        {
            let class = pool.class_of(*index);
            if cfg!(debug_assertions) {
                slot.retire(CLASSES[class].0);
            }
            pool.free.borrow_mut()[class].push_back(*index);
        }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

/// A thread's buffers: a few classes of slots in one region, and the heap past them.
#[derive(Clone)]
pub struct Pool(Rc<Shared>);

struct Shared {
    slots: RefCell<Vec<Rc<Slot>>>,
    free: RefCell<[VecDeque<usize>; CLASSES.len()]>,
}

impl Shared {
    fn class_of(&self, index: usize) -> usize {
        let mut first = 0;
        for (class, (_, count)) in CLASSES.iter().enumerate() {
            first += count;
            if index < first {
                return class;
            }
        }
        unreachable!("slots are numbered by class")
    }
}

impl Pool {
    /// Allocates the region and hands it to `register`, which tells whether the ring knows it now.
    pub fn new(register: impl FnOnce(*mut u8, usize) -> bool) -> Pool {
        let mut region = Region::new(CLASSES.iter().map(|(bytes, count)| bytes * count).sum());
        region.registered = register(region.ptr.as_ptr(), region.len);
        let region = Rc::new(region);
        let shared = Rc::new(Shared { slots: RefCell::default(), free: RefCell::default() });
        let mut offset = 0;
        for (class, (bytes, count)) in CLASSES.into_iter().enumerate() {
            for _ in 0..count {
                let index = shared.slots.borrow().len();
                let home = Some((Rc::downgrade(&shared), index));
                let slot = Slot { region: region.clone(), offset, home };
                if cfg!(debug_assertions) {
                    slot.retire(bytes);
                }
                shared.slots.borrow_mut().push(Rc::new(slot));
                shared.free.borrow_mut()[class].push_back(index);
                offset += bytes;
            }
        }
        Pool(shared)
    }

    /// A buffer of `len` bytes, of arbitrary content: a slot, or the heap's when none is free.
    ///
    /// # Panics
    /// With debug assertions, if the slot was written to while nobody held it.
    pub fn alloc(&self, len: usize) -> Buf {
        let mut free = self.0.free.borrow_mut();
        for (class, (bytes, _)) in CLASSES.iter().enumerate() {
            let next = |free: &mut VecDeque<usize>| match cfg!(debug_assertions) {
                // The one that was idle the longest.
                true => free.pop_front(),
                // The one that the processor's cache may still have.
                false => free.pop_back(),
            };
            if len <= *bytes
                && let Some(index) = next(&mut free[class])
            {
                let slot = self.0.slots.borrow()[index].clone();
                debug_assert!(slot.is_idle(*bytes), "a buffer was written to after its return");
                return Buf { memory: Memory::Own(slot), start: 0, len };
            }
        }
        drop(free);
        Buf::heap(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_home(buf: &Buf) -> bool {
        matches!(&buf.memory, Memory::Own(slot) if slot.home.is_some())
    }

    #[test]
    fn slots_return_with_their_last_window() {
        let pool = Pool::new(|_, _| false);
        let all: Vec<Buf> = (0..16).map(|_| pool.alloc(512 << 10)).collect();
        assert!(all.iter().all(is_home));
        assert!(!is_home(&pool.alloc(512 << 10)), "past the last slot comes the heap");
        let window = all[0].slice(100..200);
        drop(all);
        let most: Vec<Buf> = (0..15).map(|_| pool.alloc(400 << 10)).collect();
        assert!(!is_home(&pool.alloc(400 << 10)), "a window holds its slot");
        drop(window);
        assert!(is_home(&pool.alloc(400 << 10)));
        drop(most);
    }

    #[test]
    #[should_panic(expected = "after its return")]
    fn who_writes_to_what_was_given_back_is_found() {
        let pool = Pool::new(|_, _| false);
        let all: Vec<Buf> = (0..16).map(|_| pool.alloc(512 << 10)).collect();
        let late = all[7].as_ptr();
        drop(all);
        let all: Vec<Buf> = (0..16).map(|_| pool.alloc(512 << 10)).collect();
        assert!(all.iter().all(is_home), "nothing was written");
        drop(all);
        // SAFETY: the pool, and with it the slot, is still there.
        unsafe { late.add(100).write(1) };
        let _all: Vec<Buf> = (0..16).map(|_| pool.alloc(512 << 10)).collect();
    }

    #[test]
    fn windows_see_one_memory() {
        let buf = Buf::from_bytes(b"0123456789");
        let window = buf.slice(2..6);
        window.fill(b'x');
        buf.slice(6..10).copy_from_buf(&window);
        assert_eq!(buf.to_vec(), b"01xxxxxxxx");
    }
}
