//! What a local read of an image would save, and whether that pays for writing its chunks here.
//!
//! Invariants:
//! - An image begins to pay when its copy is slower than the local disk by [`Margin::start`], and
//!   stops below [`Margin::stop`], or when it would not begin again for a while: a disk that recovers
//!   stops promotions, one that wavers does not flap.
//! - A latency that nobody measured changes nothing; an image that was never measured does not pay.

use std::collections::BTreeMap;

use super::heat::Rank;

/// Measurements in a row that would not let an image begin to pay, after which one that does stops.
const WAVERS: u32 = 5;

/// How much slower the copy must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Margin {
    /// Times the local latency from which on promotion pays.
    pub start: f64,
    /// Times the local latency below which it no longer does.
    pub stop: f64,
    /// Nanoseconds that a read must save at least, whatever the ratio.
    pub least: u64,
}

/// The latency of an image's copy, for one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyLatency {
    /// The caller's handle of the image.
    pub image: u32,
    /// Nanoseconds of a typical read from the copy that replicas of this disk now read from.
    pub nanos: u64,
}

/// What is known of one image.
#[derive(Clone, Copy, Debug)]
struct Gain {
    copy: u64,
    saves: u64,
    factor: Rank,
    pays: bool,
    /// Measurements in a row in which it paid only because it had begun to.
    wavers: u32,
}

/// The gain of every image that was measured.
pub struct Gains {
    margin: Margin,
    local: u64,
    images: BTreeMap<u32, Gain>,
}

impl Gains {
    /// Nothing measured yet.
    pub fn new(margin: Margin) -> Gains {
        Gains { margin, local: 0, images: BTreeMap::new() }
    }

    /// Takes new measurements: of the local disk, and of the copies that were measured.
    pub fn measure(&mut self, local: u64, copies: &[CopyLatency]) {
        for latency in copies {
            let factor = Rank::factor(0.0);
            let blank = Gain { copy: 0, saves: 0, factor, pays: false, wavers: 0 };
            let gain = self.images.entry(latency.image).or_insert(blank);
            (gain.copy, gain.wavers) = (latency.nanos, gain.wavers.saturating_add(1));
        }
        if local == self.local && copies.is_empty() {
            return;
        }
        self.local = local;
        for gain in self.images.values_mut() {
            gain.saves = gain.copy.saturating_sub(local);
            gain.factor = Rank::factor(gain.saves as f64);
            let slower = |times| gain.copy as f64 >= times * local as f64;
            let begins = gain.saves >= self.margin.least && slower(self.margin.start);
            if begins || !gain.pays {
                gain.wavers = 0;
            }
            let goes_on = gain.pays && gain.saves >= self.margin.least && slower(self.margin.stop);
            gain.pays = begins || (goes_on && gain.wavers < WAVERS);
        }
    }

    /// Nanoseconds that a local read saves over one from the copy, if it pays or not.
    pub fn saves(&self, image: u32) -> u64 {
        self.images.get(&image).map_or(0, |gain| gain.saves)
    }

    /// Whether a chunk of the image is worth a write.
    pub fn pays(&self, image: u32) -> bool {
        self.images.get(&image).is_some_and(|gain| gain.pays)
    }

    /// What a heat is multiplied with to be the score of a chunk of this image.
    pub fn factor(&self, image: u32) -> Rank {
        self.images.get(&image).map_or(Rank::factor(0.0), |gain| gain.factor)
    }

    /// The latency of a local read, in nanoseconds.
    pub fn local(&self) -> u64 {
        self.local
    }

    /// Forgets an image.
    pub fn forget_image(&mut self, image: u32) {
        self.images.remove(&image);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gains() -> Gains {
        Gains::new(Margin { start: 2.0, stop: 1.25, least: 1_000 })
    }

    #[test]
    fn it_starts_late_and_stops_early() {
        let mut gains = gains();
        let mut pays = |copy| {
            gains.measure(10_000, &[CopyLatency { image: 1, nanos: copy }]);
            gains.pays(1)
        };
        assert!(!pays(19_999));
        assert!(pays(20_000));
        (1..WAVERS).for_each(|_| assert!(pays(13_000), "within the margin nothing changes"));
        assert!(pays(20_000));
        (1..WAVERS).for_each(|_| assert!(pays(13_000), "for a while"));
        assert!(!pays(13_000), "it would not begin any more");
        assert!(pays(20_000));
        assert!(!pays(12_000));
        assert!(!pays(13_000), "nor on the way back");
    }

    #[test]
    fn what_nobody_measured_does_not_pay_and_what_was_is_kept() {
        let mut gains = gains();
        assert!(!gains.pays(7));
        gains.measure(10_000, &[CopyLatency { image: 7, nanos: 1_000_000 }]);
        gains.measure(10_000, &[]);
        assert!(gains.pays(7));
        assert_eq!(gains.saves(7), 990_000);
        gains.measure(900_000, &[]);
        assert!(!gains.pays(7), "the local disk is as slow now");
        gains.measure(u64::MAX, &[CopyLatency { image: 7, nanos: u64::MAX }]);
        assert!(!gains.pays(7));
    }

    #[test]
    fn a_difference_too_small_to_matter_does_not_pay() {
        let mut gains = gains();
        gains.measure(100, &[CopyLatency { image: 1, nanos: 900 }]);
        assert!(!gains.pays(1));
    }
}
