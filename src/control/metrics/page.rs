//! A page of metrics: each with its name, its help and its samples, by the three kinds that there are.
//!
//! A metric without samples is left out, its name too.

use std::fmt::{self, Write};

use prometheus_client::{
    encoding::{
        DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, LabelSetEncoder,
        MetricEncoder, NoLabelSet,
    },
    metrics::MetricType,
    registry::Unit,
};

use crate::histogram::{self, Counts};

/// The least upper bound of a bucket: 2^14 ns, 16 µs.
const LEAST: u32 = 14;
/// Buckets with an upper bound, each twice the one before: up to 2^34 ns, 17 s.
const BOUNDS: usize = 21;

/// Durations in buckets, as Prometheus wants them: 16 µs, doubling up to 17 s, and what is more.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Latency {
    counts: [u64; BOUNDS + 1],
    seconds: f64,
}

impl Latency {
    /// The same in coarser buckets. A bucket holds what is less than its bound, and nothing that is more:
    /// the finer buckets end where these do.
    pub fn of(counts: &Counts) -> Latency {
        let mut latency = Latency { counts: [0; BOUNDS + 1], seconds: counts.nanos as f64 / 1e9 };
        let mut at = 0;
        for (bucket, count) in counts.buckets.iter().enumerate() {
            while at < BOUNDS && histogram::floor(bucket) >= 1 << (LEAST + at as u32) {
                at += 1;
            }
            latency.counts[at] += count;
        }
        latency
    }

    /// How many there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn encode(&self, mut metric: MetricEncoder<'_>) -> fmt::Result {
        let mut buckets = [(f64::INFINITY, 0); BOUNDS + 1];
        for (at, (bucket, count)) in buckets.iter_mut().zip(self.counts).enumerate() {
            let bound = (1_u64 << (LEAST + at as u32)) as f64 / 1e9;
            *bucket = (if at < BOUNDS { bound } else { f64::INFINITY }, count);
        }
        metric.encode_histogram::<NoLabelSet>(self.seconds, self.total(), &buckets, None)
    }
}

/// Labels as text: the 24 lines of a histogram repeat them, and most of its cost is that.
struct Written {
    /// All that stands before the last one's value.
    head: String,
    last: String,
}

impl Written {
    fn new(labels: &[(&'static str, &str)]) -> Written {
        let (mut head, mut last) = (String::with_capacity(64), String::new());
        for (at, (key, value)) in labels.iter().enumerate() {
            if at > 0 {
                head.push_str("=\"");
                escape(&last, &mut head);
                head.push_str("\",");
            }
            head.push_str(key);
            last.clear();
            last.push_str(value);
        }
        Written { head, last }
    }
}

/// Appends a label's value as the format wants it within quotation marks.
fn escape(value: &str, to: &mut String) {
    for letter in value.chars() {
        match letter {
            '\n' => to.push_str("\\n"),
            '"' | '\\' => to.extend(['\\', letter]),
            _ => to.push(letter),
        }
    }
}

impl EncodeLabelSet for Written {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let mut label = encoder.encode_label();
        let mut key = label.encode_label_key()?;
        key.write_str(&self.head)?;
        let mut value = key.encode_label_value()?;
        value.write_str(&self.last)?;
        value.finish()
    }
}

/// Where metrics are written.
pub(super) struct Page<'a>(pub(super) DescriptorEncoder<'a>);

/// What a metric is called, with its unit, and what it says.
#[derive(Clone, Copy)]
pub(super) struct About(pub(super) &'static str, pub(super) Of, pub(super) &'static str);

/// What a metric is a number of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// Things: the name says which.
    Things,
    Bytes,
    Seconds,
}

impl Of {
    fn unit(self) -> Option<Unit> {
        match self {
            Of::Things => None,
            Of::Bytes => Some(Unit::Bytes),
            Of::Seconds => Some(Unit::Seconds),
        }
    }
}

impl Page<'_> {
    /// What goes up and down.
    pub(super) fn gauge<L: EncodeLabelSet, V: EncodeGaugeValue>(
        &mut self,
        About(name, of, help): About,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let unit = of.unit();
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        samples.try_for_each(|(labels, value)| metric.encode_family(&labels)?.encode_gauge(&value))
    }

    /// What only grows.
    pub(super) fn counter<L: EncodeLabelSet, V: EncodeCounterValue>(
        &mut self,
        About(name, of, help): About,
        samples: impl IntoIterator<Item = (L, V)>,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let unit = of.unit();
        let mut metric =
            self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        samples.try_for_each(|(labels, value)| {
            metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, f64>(&value, None)
        })
    }

    /// Durations.
    pub(super) fn latency<'l, const N: usize>(
        &mut self,
        About(name, _, help): About,
        samples: impl IntoIterator<Item = ([(&'static str, &'l str); N], &'l Latency)>,
    ) -> fmt::Result {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return Ok(());
        }
        let mut metric =
            self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        samples.try_for_each(|(labels, latency)| {
            latency.encode(metric.encode_family(&Written::new(&labels))?)
        })
    }

    /// Durations of one thing.
    pub(super) fn times(&mut self, about: About, latency: &Latency) -> fmt::Result {
        let (About(name, _, help), unit) = (about, Some(&Unit::Seconds));
        latency.encode(self.0.encode_descriptor(name, help, unit, MetricType::Histogram)?)
    }

    /// One number that goes up and down.
    pub(super) fn one<V: EncodeGaugeValue>(&mut self, about: About, value: V) -> fmt::Result {
        let About(name, of, help) = about;
        let unit = of.unit();
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        metric.encode_gauge(&value)
    }

    /// One number that only grows.
    pub(super) fn count<V: EncodeCounterValue>(&mut self, about: About, value: V) -> fmt::Result {
        let About(name, of, help) = about;
        let unit = of.unit();
        let mut metric =
            self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        metric.encode_counter::<NoLabelSet, _, f64>(&value, None)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::histogram::Histogram;

    #[test]
    fn labels_are_escaped_as_the_format_says() {
        let written = Written::new(&[("a", "x\"\\\n"), ("b", "y"), ("c", "z")]);
        assert_eq!(written.head, r#"a="x\"\\\n",b="y",c"#);
        assert_eq!(written.last, "z");
    }

    #[test]
    fn buckets_hold_what_is_less_than_their_bounds() {
        let histogram = Histogram::default();
        for nanos in [0, 16_383, 16_384, 32_767, 32_768, 1 << 34, (1 << 34) - 1, u64::MAX / 4] {
            histogram.record(Duration::from_nanos(nanos));
        }
        let latency = Latency::of(&histogram.counts());
        assert_eq!(latency.total(), 8);
        assert_eq!(latency.counts[..3], [2, 2, 1]);
        assert_eq!(latency.counts[BOUNDS - 1..], [1, 2]);
        assert_eq!(Latency::of(&Counts::default()), Latency::default());
    }
}
