//! What the policy is compared with: caches that decide at every access, at once.
//!
//! None of them is product code. Each is its paper's algorithm, over keys of one size; whatever
//! enters the cache is written once (moves between queues are free).

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

/// What became of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The cache had it.
    Hit,
    /// It had not, and wrote it.
    Inserted,
    /// It had not, and let it pass.
    Passed,
}

/// A cache that is told its accesses one by one.
pub trait Cache {
    fn access(&mut self, key: u64) -> Outcome;
}

/// Keys by when they were last used.
#[derive(Default)]
struct Recency {
    clock: u64,
    used: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
}

impl Recency {
    fn len(&self) -> usize {
        self.used.len()
    }

    fn remove(&mut self, key: u64) -> bool {
        let used = self.used.remove(&key);
        used.is_some_and(|used| self.order.remove(&used).is_some())
    }

    fn renew(&mut self, key: u64) {
        self.remove(key);
        self.clock += 1;
        self.used.insert(key, self.clock);
        self.order.insert(self.clock, key);
    }

    fn drop_oldest(&mut self) {
        if let Some((_, key)) = self.order.pop_first() {
            self.used.remove(&key);
        }
    }
}

/// Least recently used goes first.
pub struct Lru {
    size: usize,
    cached: Recency,
}

impl Lru {
    pub fn new(size: usize) -> Lru {
        Lru { size, cached: Recency::default() }
    }
}

impl Cache for Lru {
    fn access(&mut self, key: u64) -> Outcome {
        let hit = self.cached.used.contains_key(&key);
        self.cached.renew(key);
        if self.cached.len() > self.size {
            self.cached.drop_oldest();
        }
        if hit { Outcome::Hit } else { Outcome::Inserted }
    }
}

/// LARC (Huang et al., MSST 2013): LRU behind a ghost queue whose size adapts: what misses twice
/// within it is let in.
pub struct Larc {
    size: f64,
    ghosts: f64,
    cached: Recency,
    ghost: Recency,
}

impl Larc {
    pub fn new(size: usize) -> Larc {
        let size = size as f64;
        Larc { size, ghosts: 0.1 * size, cached: Recency::default(), ghost: Recency::default() }
    }
}

impl Cache for Larc {
    fn access(&mut self, key: u64) -> Outcome {
        if self.cached.used.contains_key(&key) {
            self.cached.renew(key);
            self.ghosts -= self.size / (self.size - self.ghosts);
            self.ghosts = self.ghosts.max(0.1 * self.size);
            return Outcome::Hit;
        }
        self.ghosts = (self.ghosts + self.size / self.ghosts).min(0.9 * self.size);
        if self.ghost.remove(key) {
            self.cached.renew(key);
            if self.cached.len() as f64 > self.size {
                self.cached.drop_oldest();
            }
            return Outcome::Inserted;
        }
        self.ghost.renew(key);
        while self.ghost.len() as f64 > self.ghosts.max(1.0) {
            self.ghost.drop_oldest();
        }
        Outcome::Passed
    }
}

/// S3-FIFO (Yang et al., SOSP 2023): a small queue of a tenth, a main queue, a ghost queue as long
/// as main.
pub struct S3Fifo {
    small_size: usize,
    main_size: usize,
    small: VecDeque<u64>,
    main: VecDeque<u64>,
    ghost: VecDeque<u64>,
    ghosts: HashSet<u64>,
    /// How often a cached key was hit, up to 3.
    uses: HashMap<u64, u8>,
}

impl S3Fifo {
    pub fn new(size: usize) -> S3Fifo {
        let small_size = (size / 10).max(1);
        S3Fifo {
            small_size,
            main_size: (size - small_size).max(1),
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghost: VecDeque::new(),
            ghosts: HashSet::new(),
            uses: HashMap::new(),
        }
    }

    fn make_room(&mut self) {
        while self.small.len() + self.main.len() >= self.small_size + self.main_size {
            if self.small.len() >= self.small_size { self.drain_small() } else { self.drain_main() }
        }
    }

    fn drain_small(&mut self) {
        while let Some(key) = self.small.pop_front() {
            if self.uses.get(&key).is_some_and(|&uses| uses > 1) {
                self.uses.insert(key, 0);
                self.main.push_back(key);
                if self.main.len() > self.main_size {
                    return self.drain_main();
                }
                continue;
            }
            self.uses.remove(&key);
            if self.ghosts.insert(key) {
                self.ghost.push_back(key);
            }
            if self.ghost.len() > self.main_size
                && let Some(old) = self.ghost.pop_front()
            {
                self.ghosts.remove(&old);
            }
            return;
        }
    }

    fn drain_main(&mut self) {
        while let Some(key) = self.main.pop_front() {
            match self.uses.get_mut(&key) {
                Some(uses) if *uses > 0 => {
                    *uses -= 1;
                    self.main.push_back(key);
                }
                _ => {
                    self.uses.remove(&key);
                    return;
                }
            }
        }
    }
}

impl Cache for S3Fifo {
    fn access(&mut self, key: u64) -> Outcome {
        if let Some(uses) = self.uses.get_mut(&key) {
            *uses = (*uses + 1).min(3);
            return Outcome::Hit;
        }
        self.make_room();
        self.uses.insert(key, 0);
        if self.ghosts.remove(&key) {
            self.ghost.retain(|&ghost| ghost != key);
            self.main.push_back(key);
        } else {
            self.small.push_back(key);
        }
        Outcome::Inserted
    }
}

/// Belady's optimum with bypass: it knows the future, evicts what is used again last, and lets pass
/// what is used again later than all it has, or never. The most hits that there can be; its writes
/// are what that takes, not the least that there could be.
pub struct Belady {
    size: usize,
    /// For each access, when its key is used next.
    next: std::vec::IntoIter<u64>,
    cached: HashMap<u64, u64>,
    order: BTreeMap<u64, u64>,
}

impl Belady {
    pub fn new(size: usize, keys: &[u64]) -> Belady {
        let mut next = vec![u64::MAX; keys.len()];
        let mut seen = HashMap::new();
        for (index, key) in keys.iter().enumerate().rev() {
            next[index] = seen.insert(*key, index as u64).unwrap_or(u64::MAX);
        }
        Belady { size, next: next.into_iter(), cached: HashMap::new(), order: BTreeMap::new() }
    }
}

impl Cache for Belady {
    fn access(&mut self, key: u64) -> Outcome {
        let next = self.next.next().unwrap_or(u64::MAX);
        let cached = self.cached.remove(&key);
        if let Some(now) = cached {
            self.order.remove(&now);
        }
        let missed = if cached.is_some() { Outcome::Hit } else { Outcome::Passed };
        if next == u64::MAX {
            return missed;
        }
        if self.cached.len() == self.size {
            match self.order.last_entry() {
                Some(last) if *last.key() > next => {
                    self.cached.remove(&last.remove());
                }
                _ => return missed,
            }
        }
        self.cached.insert(key, next);
        self.order.insert(next, key);
        if cached.is_some() { Outcome::Hit } else { Outcome::Inserted }
    }
}
