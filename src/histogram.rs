//! Latencies, counted in buckets of an eighth of an octave: whoever records touches two counters and
//! takes no lock; whoever asks gets quantiles that are off by 6 % at most.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Linear steps within an octave.
const STEPS: usize = 8;
/// Buckets: from 128 ns to 68 s; what takes longer is counted in the last.
pub const BUCKETS: usize = 224;
/// Nanoseconds are counted in units of 2^7.
const UNIT: u32 = 7;

/// Counts that grow.
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    nanos: AtomicU64,
}

/// A histogram's counts at one moment, or what was added between two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// How often each bucket was hit.
    pub buckets: Box<[u64; BUCKETS]>,
    /// The sum of all durations, in nanoseconds.
    pub nanos: u64,
}

/// The bucket of a duration in nanoseconds.
pub fn bucket(nanos: u64) -> usize {
    let value = nanos >> UNIT;
    let octave = value.checked_ilog2().unwrap_or(0).saturating_sub(STEPS.ilog2());
    let step = (value >> octave) as usize;
    (octave as usize * STEPS + step).min(BUCKETS - 1)
}

/// The least duration of a bucket, in nanoseconds.
pub fn floor(bucket: usize) -> u64 {
    let octave = (bucket / STEPS).saturating_sub(1);
    ((bucket - octave * STEPS) as u64) << octave << UNIT
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { buckets: [const { AtomicU64::new(0) }; BUCKETS], nanos: AtomicU64::new(0) }
    }
}

impl Histogram {
    /// Counts a duration.
    pub fn record(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// The counts as of now.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (count, bucket) in counts.buckets.iter_mut().zip(&self.buckets) {
            *count = bucket.load(Ordering::Relaxed);
        }
        counts.nanos = self.nanos.load(Ordering::Relaxed);
        counts
    }
}

impl Default for Counts {
    fn default() -> Counts {
        Counts { buckets: Box::new([0; BUCKETS]), nanos: 0 }
    }
}

impl Counts {
    /// How many there are.
    pub fn total(&self) -> u64 {
        self.buckets.iter().fold(0, |sum: u64, count| sum.saturating_add(*count))
    }

    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Counts) -> Counts {
        let mut counts = self.clone();
        for (count, before) in counts.buckets.iter_mut().zip(earlier.buckets.iter()) {
            *count = count.wrapping_sub(*before);
        }
        counts.nanos = self.nanos.wrapping_sub(earlier.nanos);
        counts
    }

    /// Adds the counts of another, which may come from outside: what is too much for the sum is lost.
    pub fn add(&mut self, other: &Counts) {
        for (count, more) in self.buckets.iter_mut().zip(other.buckets.iter()) {
            *count = count.saturating_add(*more);
        }
        self.nanos = self.nanos.saturating_add(other.nanos);
    }

    /// Those that took `nanos` or longer; their sum is that of their buckets' middles.
    #[must_use]
    pub fn above(&self, nanos: u64) -> Counts {
        let mut counts = Counts::default();
        for at in bucket(nanos)..BUCKETS {
            counts.buckets[at] = self.buckets[at];
            let nanos = self.buckets[at].saturating_mul(floor(at).midpoint(floor(at + 1)));
            counts.nanos = counts.nanos.saturating_add(nanos);
        }
        counts
    }

    /// The mean in nanoseconds; `None` of nothing.
    pub fn mean(&self) -> Option<u64> {
        self.nanos.checked_div(self.total())
    }

    /// The duration in nanoseconds that `share` (0 to 1) of them stay below: the middle of its
    /// bucket. `None` of nothing.
    pub fn quantile(&self, share: f64) -> Option<u64> {
        let total = self.total();
        let rank = ((total as f64 * share).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0_u64;
        let found = self.buckets.iter().position(|count| {
            seen = seen.saturating_add(*count);
            seen >= rank
        });
        found.filter(|_| total > 0).map(|bucket| floor(bucket).midpoint(floor(bucket + 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_hold_what_they_say() {
        for bucket in 0..BUCKETS - 1 {
            assert!(floor(bucket) < floor(bucket + 1), "{bucket}");
            assert_eq!(super::bucket(floor(bucket)), bucket);
            assert_eq!(super::bucket(floor(bucket + 1) - 1), bucket);
        }
        assert_eq!(super::bucket(u64::MAX), BUCKETS - 1);
        assert!(floor(BUCKETS - 1) > 60_000_000_000);
    }

    #[test]
    fn sums_end_where_numbers_do() {
        let mut counts = Counts { nanos: u64::MAX, ..Counts::default() };
        counts.buckets[3] = u64::MAX;
        counts.buckets[BUCKETS - 1] = u64::MAX;
        counts.add(&counts.clone());
        assert_eq!((counts.total(), counts.nanos), (u64::MAX, u64::MAX));
        assert_eq!(counts.above(1 << 20).nanos, u64::MAX);
        assert_eq!(counts.mean(), Some(1));
        assert!(counts.quantile(0.5).is_some() && counts.quantile(1.0).is_some());
    }

    #[test]
    fn quantiles_are_close() {
        let histogram = Histogram::default();
        let before = histogram.counts();
        assert_eq!((before.mean(), before.quantile(0.5)), (None, None));
        for micros in 1..=10_000 {
            histogram.record(Duration::from_micros(micros));
        }
        let counts = histogram.counts().since(&before);
        assert_eq!((counts.total(), counts.mean()), (10_000, Some(5_000_500)));
        for (share, exact) in [(0.01, 100e3), (0.5, 5000e3), (0.99, 9900e3), (1.0, 10_000e3)] {
            let told = counts.quantile(share).unwrap() as f64;
            assert!((told / exact - 1.0).abs() < 0.07, "{share}: {told} for {exact}");
        }
    }
}
