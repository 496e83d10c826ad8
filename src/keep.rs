//! Which copies are to be made, and which are too many: a pure function of what is there.
//!
//! A copy that is missing is waited for, because a disk may come back; one that was never there is made
//! at once. A copy too many, because a disk came back, goes after the same time, the worst placed first.
//! One with chunks that can't be written anew serves on, but another is made in its place.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use crate::catalog::{Digest, Name, Tier};

/// An image and its copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// How many copies are wanted.
    pub wanted: usize,
    /// Those that serve.
    pub copies: Vec<Place>,
}

/// Where a copy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The disk.
    pub disk: Name,
    /// Whether that is of the kind that images are placed on.
    pub fits: bool,
    /// How fast it is.
    pub tier: Option<Tier>,
    /// Whether it fails together with another disk that has a copy.
    pub together: bool,
    /// Whether it is in trouble.
    pub troubled: bool,
    /// Whether chunks of the copy are not sound, and can't be made so.
    pub damaged: bool,
}

/// What is to be done for an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// One more copy is to be made.
    Make,
    /// The copy on this disk is too many: once the others are found sound, it goes.
    Remove(Name),
}

/// What was seen so far.
#[derive(Debug)]
pub struct Keeper {
    patience: Duration,
    seen: HashMap<Digest, Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The most copies that there ever were.
    most: usize,
    /// For how long there have been too few, and too many.
    short: Duration,
    surplus: Duration,
}

impl Keeper {
    /// One who waits so long for what is missing.
    pub fn new(patience: Duration) -> Keeper {
        Keeper { patience, seen: HashMap::new() }
    }

    /// Takes in what there is, so long after it was asked last, and says what is to be done.
    pub fn tick(
        &mut self,
        passed: Duration,
        images: &BTreeMap<Digest, Held>,
    ) -> Vec<(Digest, Action)> {
        self.seen.retain(|digest, _| images.contains_key(digest));
        let mut actions = Vec::new();
        for (digest, held) in images {
            let seen = self.seen.entry(*digest).or_default();
            let count = held.copies.len();
            let whole = held.copies.iter().filter(|place| !place.damaged).count();
            seen.most = seen.most.max(whole);
            let add = |time: Duration, grows: bool| match grows {
                true => time.saturating_add(passed),
                false => Duration::ZERO,
            };
            // With none left there is nothing to make one from.
            let short = whole < held.wanted && count > 0;
            let surplus = count > held.wanted && !short;
            let lost = seen.most >= held.wanted;
            seen.short = add(seen.short, short);
            seen.surplus = add(seen.surplus, surplus);
            if short && (!lost || seen.short >= self.patience) {
                actions.push((*digest, Action::Make));
            } else if surplus && seen.surplus >= self.patience {
                let worst = held.copies.iter().max_by_key(|place| {
                    let ill = (place.damaged, place.troubled, place.together);
                    (ill, !place.fits, place.tier, &place.disk)
                });
                actions.extend(worst.map(|worst| (*digest, Action::Remove(worst.disk.clone()))));
            }
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const DIGEST: Digest = Digest([1; 32]);

    fn place(disk: &str) -> Place {
        let disk = disk.parse().unwrap();
        let tier = Some(Tier::Ssd);
        Place { disk, fits: false, tier, together: false, troubled: false, damaged: false }
    }

    fn tick(keeper: &mut Keeper, seconds: u64, wanted: usize, disks: &[&str]) -> Option<Action> {
        let held = Held { wanted, copies: disks.iter().map(|disk| place(disk)).collect() };
        let images = BTreeMap::from([(DIGEST, held)]);
        let mut actions = keeper.tick(Duration::from_secs(seconds), &images);
        assert!(actions.len() < 2);
        actions.pop().map(|(_, action)| action)
    }

    #[test]
    fn what_never_was_is_made_at_once_and_what_is_missing_is_waited_for() {
        let mut keeper = Keeper::new(MINUTE);
        assert_eq!(tick(&mut keeper, 5, 2, &["a"]), Some(Action::Make));
        assert_eq!(tick(&mut keeper, 5, 2, &["a", "b"]), None);
        for _ in 0..11 {
            assert_eq!(tick(&mut keeper, 5, 2, &["a"]), None);
        }
        assert_eq!(tick(&mut keeper, 5, 2, &["a"]), Some(Action::Make));
        assert_eq!(tick(&mut keeper, 5, 2, &[]), None, "nothing is left to make it from");
        assert_eq!(tick(&mut keeper, 5, 2, &["a"]), None, "it is waited for anew");
        assert_eq!(tick(&mut keeper, 5, 3, &["a"]), Some(Action::Make), "it never had three");
    }

    #[test]
    fn what_is_too_many_goes_the_worst_first() {
        let mut keeper = Keeper::new(MINUTE);
        assert_eq!(tick(&mut keeper, 59, 1, &["a", "b"]), None);
        assert_eq!(tick(&mut keeper, 5, 1, &["a"]), None);
        assert_eq!(tick(&mut keeper, 59, 1, &["a", "b"]), None);
        assert_eq!(
            tick(&mut keeper, 1, 1, &["a", "b"]),
            Some(Action::Remove("b".parse().unwrap()))
        );
        let worst = |places: Vec<Place>| {
            let held = Held { wanted: 2, copies: places };
            let mut keeper = Keeper::new(Duration::ZERO);
            keeper.tick(MINUTE, &BTreeMap::from([(DIGEST, held)])).pop().unwrap().1
        };
        let pool = |place| Place { fits: true, ..place };
        let slow = |place| Place { tier: Some(Tier::Hdd), ..place };
        let ill = |place| Place { troubled: true, ..place };
        let gone = |disk: &str| Action::Remove(disk.parse().unwrap());
        assert_eq!(worst(vec![place("a"), pool(place("b")), pool(place("c"))]), gone("a"));
        assert_eq!(worst(vec![place("c"), slow(place("a")), place("b")]), gone("a"));
        assert_eq!(worst(vec![slow(place("c")), ill(pool(place("a"))), place("b")]), gone("a"));
        let damaged = |place| Place { damaged: true, ..place };
        assert_eq!(worst(vec![ill(place("c")), damaged(place("a")), place("b")]), gone("a"));
    }

    #[test]
    fn a_damaged_copy_stays_until_another_is_there() {
        let mut keeper = Keeper::new(MINUTE);
        let mut tick = |seconds, places: &[Place]| {
            let held = Held { wanted: 2, copies: places.to_vec() };
            let images = BTreeMap::from([(DIGEST, held)]);
            keeper.tick(Duration::from_secs(seconds), &images).pop().map(|(_, action)| action)
        };
        let damaged = Place { damaged: true, ..place("a") };
        assert_eq!(tick(5, &[place("a"), place("b")]), None);
        assert_eq!(tick(59, &[damaged.clone(), place("b")]), None);
        assert_eq!(tick(1, &[damaged.clone(), place("b")]), Some(Action::Make));
        let three = [damaged.clone(), place("b"), place("c")];
        assert_eq!(tick(59, &three), None);
        assert_eq!(tick(1, &three), Some(Action::Remove("a".parse().unwrap())));
        assert_eq!(
            tick(90, &[damaged.clone(), place("b")]),
            Some(Action::Make),
            "it was lost again"
        );
        assert_eq!(tick(90, &[damaged]), Some(Action::Make), "what it has can be copied");
    }

    #[test]
    fn whatever_comes_and_goes_it_ends_with_what_is_wanted() {
        for seed in 0..500 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut keeper = Keeper::new(MINUTE);
            let wanted = rng.usize(1..4);
            let all = ["a", "b", "c", "d", "e"];
            let mut there = vec!["a"];
            for step in 0..400 {
                // For a while disks come and go; then they stay.
                if step < 100 && rng.u8(..4) == 0 {
                    let disk = all[rng.usize(..5)];
                    match there.iter().position(|it| *it == disk) {
                        Some(at) if there.len() > 1 => drop(there.remove(at)),
                        Some(_) => {}
                        None => there.push(disk),
                    }
                }
                let before = there.len();
                match tick(&mut keeper, rng.u64(1..30), wanted, &there) {
                    Some(Action::Make) => {
                        assert!(before < wanted, "seed {seed}");
                        let free = all.iter().find(|disk| !there.contains(disk));
                        there.push(free.expect("five disks for three copies"));
                    }
                    Some(Action::Remove(disk)) => {
                        assert!(before > wanted, "seed {seed}");
                        there.retain(|it| *it != disk.as_str());
                    }
                    None => {}
                }
            }
            assert_eq!(there.len(), wanted, "seed {seed}");
        }
    }
}
