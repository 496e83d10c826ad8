//! What a policy is told once, and which values make sense.

use std::time::Duration;

use super::gain::Margin;
use crate::error::{Error, Kind, Result};

/// The longest half-life: beyond it, a touch as good as never fades.
const HALF_LIFE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// What the policy of a disk can be told once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// How long it takes a touch to be worth half.
    pub half_life: Duration,
    /// How many touches earn a promotion, if none of them has faded by more than about half.
    pub admission: u32,
    /// How many times the victim's score a chunk must have to take its place, 1 or more.
    pub edge: f64,
    /// How many chunks in order make a run long.
    pub long_run: u64,
    /// When an image pays.
    pub margin: Margin,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            half_life: Duration::from_secs(1800),
            admission: 2,
            edge: 1.1,
            long_run: 16,
            margin: Margin { start: 2.0, stop: 1.25, least: 50_000 },
        }
    }
}

impl Settings {
    /// Whether a policy can work with these.
    ///
    /// # Errors
    /// [`Kind::Invalid`], naming the setting and what it may be.
    pub fn check(&self) -> Result<()> {
        let Margin { start, stop, .. } = self.margin;
        let wrong = if !(Duration::from_secs(1)..=HALF_LIFE_MAX).contains(&self.half_life) {
            format!("a half-life of {:?}: give 1 s to 30 days", self.half_life)
        } else if !(1..=100).contains(&self.admission) {
            format!("admission at {} touches: give 1 to 100", self.admission)
        } else if !(1.0..=1000.0).contains(&self.edge) {
            format!("an edge of {}: give 1 to 1000 times the victim's score", self.edge)
        } else if self.long_run == 0 {
            "long runs of 0 chunks: give 1 or more".to_string()
        } else if !(1.0..=1000.0).contains(&stop) || !(stop..=1000.0).contains(&start) {
            format!("margins {start} and {stop}: give 1 <= stop <= start <= 1000")
        } else {
            return Ok(());
        };
        Err(Error::new(Kind::Invalid, format!("promotion policy: {wrong}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        type Spoil = fn(&mut Settings);
        let wrong: [(&str, Spoil); 6] = [
            ("half-life", |s| s.half_life = Duration::ZERO),
            ("admission", |s| s.admission = 0),
            ("edge", |s| s.edge = f64::NAN),
            ("long runs", |s| s.long_run = 0),
            ("margins", |s| s.margin.stop = 3.0),
            ("margins", |s| s.margin.start = f64::INFINITY),
        ];
        assert!(Settings::default().check().is_ok());
        for (name, spoil) in wrong {
            let mut settings = Settings::default();
            spoil(&mut settings);
            let error = settings.check().unwrap_err();
            assert_eq!(error.kind(), Kind::Invalid);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
