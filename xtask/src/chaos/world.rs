//! What there is on the node, as far as those who changed it were told: which images and replicas, how large,
//! what they stand on and hold. What was cut short by a kill may have happened or not, and is found out.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fastrand::Rng;

use super::model::Content;

/// An image that may be there: its content is known, and so is the file to import.
pub struct Source {
    /// What it is called.
    pub name: String,
    /// The file.
    pub file: PathBuf,
    /// What is in it.
    pub content: Arc<Vec<u8>>,
    /// It has two copies and is always there: the acts don't remove it, nor its copies.
    pub kept: bool,
}

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It is.
    Here,
    /// It isn't.
    Gone,
    /// Whoever made or removed it was cut short.
    Unknown,
}

/// Whether a replica stands on its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stands {
    /// It does.
    On,
    /// It may.
    Maybe,
    /// It needs none any more.
    Alone,
}

/// A replica.
#[derive(Clone)]
pub struct Replica {
    /// Whether it is there.
    pub presence: Presence,
    /// The sizes that it may have.
    pub sizes: Vec<u64>,
    /// Which image it was made of.
    pub source: usize,
    /// Whether it stands on that.
    pub stands: Stands,
    /// What it holds.
    pub content: Arc<Mutex<Content>>,
    /// Whether a guest uses it.
    pub used: bool,
    /// It goes on standing on its image: the acts don't flatten it.
    pub kept: bool,
}

/// What there is.
pub struct State {
    /// By name.
    pub replicas: BTreeMap<String, Replica>,
    /// For each source whether the image is there.
    pub images: Vec<Presence>,
    claims: BTreeSet<String>,
}

/// How often what was done, refused, and cut short.
pub type Tally = BTreeMap<&'static str, [u64; 3]>;

/// The node.
pub struct World {
    /// The images that may be there.
    pub sources: Vec<Source>,
    /// The disks that take replicas.
    pub disks: Vec<String>,
    /// All disks.
    pub all_disks: Vec<String>,
    /// Whether disks may be ill.
    pub ill: bool,
    /// Whether a disk is away: what is removed meanwhile may come back with it.
    pub away: AtomicBool,
    state: Mutex<State>,
    tally: Mutex<Tally>,
}

impl World {
    /// Nothing is there yet. Those of `pools` may be ill.
    pub fn new(sources: Vec<Source>, disks: &[&str], pools: &[&str]) -> World {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let (disks, all_disks): (Vec<String>, _) = (owned(disks), owned(&[disks, pools].concat()));
        let (ill, away) = (!pools.is_empty(), AtomicBool::new(false));
        let images = vec![Presence::Gone; sources.len()];
        let state = State { replicas: BTreeMap::new(), images, claims: BTreeSet::new() };
        World {
            sources,
            disks,
            all_disks,
            ill,
            away,
            state: Mutex::new(state),
            tally: Mutex::default(),
        }
    }

    /// What there is, held still.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to make, remove or change something; `None` if somebody else is at it.
    pub fn claim(&self, what: String) -> Option<Claim<'_>> {
        let free = self.state().claims.insert(what.clone());
        free.then(|| Claim { world: self, what })
    }

    /// Any replica that is there, as it is now.
    pub fn any_replica(
        &self,
        rng: &mut Rng,
        fits: impl Fn(&Replica) -> bool,
    ) -> Option<(String, Replica)> {
        let state = self.state();
        let here = state.replicas.iter();
        let here = here.filter(|(_, it)| it.presence == Presence::Here && fits(it));
        rng.choice(here.collect::<Vec<_>>()).map(|(name, it)| (name.clone(), it.clone()))
    }

    /// Any image that is in this state.
    pub fn any_image(
        &self,
        rng: &mut Rng,
        presence: Presence,
        may: impl Fn(&Source) -> bool,
    ) -> Option<usize> {
        let state = self.state();
        let all = (0..self.sources.len())
            .filter(|at| state.images[*at] == presence && may(&self.sources[*at]));
        rng.choice(all.collect::<Vec<_>>())
    }

    /// Changes what is known of a replica.
    pub fn with<T>(&self, name: &str, change: impl FnOnce(&mut Replica) -> T) -> Option<T> {
        self.state().replicas.get_mut(name).map(change)
    }

    /// Counts an act: done, refused, or cut short.
    pub fn count(&self, act: &'static str, how: usize) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.entry(act).or_default()[how] += 1;
    }

    /// How often what happened.
    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The counts on one line.
pub fn told(tally: &Tally) -> String {
    let each =
        tally.iter().map(|(act, [done, refused, cut])| format!("{act} {done}/{refused}/{cut}"));
    each.collect::<Vec<_>>().join(", ")
}

/// A right that is given back when it goes.
pub struct Claim<'a> {
    world: &'a World,
    what: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.world.state().claims.remove(&self.what);
    }
}
