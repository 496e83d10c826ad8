//! Histograms of times: what the programs count, as it is reported and read.

use serde::{Deserialize, Serialize};
use underlay_agent_ebpf::{BUCKETS, floor};

/// How often each span of time was seen. Buckets are at most 1/8 of their time wide, from 1 µs to
/// 68.7 s. Only buckets that are not empty are kept and sent, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Histogram {
    buckets: Vec<(u16, u64)>,
}

impl Histogram {
    /// Of counts by bucket; those past the last bucket are left out.
    pub fn from_counts(counts: impl IntoIterator<Item = u64>) -> Histogram {
        let counted = (0u16..).zip(counts).take(BUCKETS).filter(|(_, count)| *count > 0);
        Histogram { buckets: counted.collect() }
    }

    /// How many times were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Histogram) {
        for (bucket, count) in &other.buckets {
            match self.buckets.binary_search_by_key(bucket, |(bucket, _)| *bucket) {
                Ok(at) => self.buckets[at].1 = self.buckets[at].1.saturating_add(*count),
                Err(at) => self.buckets.insert(at, (*bucket, *count)),
            }
        }
    }

    /// The time below which the share `of` (0 to 1) of all lie, in nanoseconds; interpolated within
    /// its bucket. Nothing if nothing was counted.
    pub fn quantile(&self, of: f64) -> Option<u64> {
        let rank = of.clamp(0.0, 1.0) * self.count() as f64;
        let mut before = 0.0;
        for (bucket, count) in &self.buckets {
            let with = before + *count as f64;
            if with >= rank && *count > 0 {
                let (from, to) = bounds(*bucket);
                let share = ((rank - before) / *count as f64).clamp(0.0, 1.0);
                return Some(from + ((to - from) as f64 * share) as u64);
            }
            before = with;
        }
        self.buckets.last().map(|(bucket, _)| bounds(*bucket).1)
    }

    /// Each bucket that is not empty: from, to (nanoseconds), how many.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        self.buckets.iter().map(|(bucket, count)| {
            let (from, to) = bounds(*bucket);
            (from, to, *count)
        })
    }
}

fn bounds(bucket: u16) -> (u64, u64) {
    let bucket = usize::from(bucket);
    (floor(bucket), floor(bucket + 1).max(floor(bucket)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use underlay_agent_ebpf::bucket;

    fn of(times: &[u64]) -> Histogram {
        let mut counts = vec![0; BUCKETS];
        times.iter().for_each(|ns| counts[bucket(*ns) as usize] += 1);
        Histogram::from_counts(counts)
    }

    #[test]
    fn quantiles_are_within_an_eighth_of_the_truth() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut times: Vec<u64> = (0..10_000).map(|_| 1 << random.u32(10..34)).collect();
        times.iter_mut().for_each(|ns| *ns += random.u64(0..*ns));
        let histogram = of(&times);
        times.sort_unstable();
        for share in [0.01, 0.5, 0.9, 0.99, 0.999] {
            let truth = times[(share * 10_000.0) as usize - 1] as f64;
            let said = histogram.quantile(share).unwrap() as f64;
            assert!((said - truth).abs() <= truth / 8.0 + 1024.0, "{share}: {said} for {truth}");
        }
        assert_eq!(histogram.count(), 10_000);
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn adding_is_counting_together() {
        let (a, b) = (of(&[5_000, 900_000]), of(&[5_000, 70, u64::MAX]));
        let mut sum = a.clone();
        sum.add(&b);
        assert_eq!(sum, of(&[5_000, 900_000, 5_000, 70, u64::MAX]));
    }

    #[test]
    fn what_came_over_a_socket_is_read_without_trust() {
        let hostile: Histogram =
            serde_json::from_str("[[65535,1],[3,18446744073709551615]]").unwrap();
        assert_eq!(hostile.count(), u64::MAX);
        for share in [f64::NAN, -1.0, 0.0, 0.5, 1.0, 9.0] {
            let _ = hostile.quantile(share);
        }
        assert_eq!(hostile.iter().count(), 2);
    }
}
