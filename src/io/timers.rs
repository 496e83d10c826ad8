//! One thread's timers: what sleeps, and until when.
//!
//! A ring waits for completions until the first of them is due, so that a timer costs the kernel
//! nothing of its own.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

/// A thread's timers.
#[derive(Default)]
pub(super) struct Timers {
    /// By when they are due, and a number that tells those of one moment apart.
    due: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next: Cell<u64>,
}

impl Timers {
    /// How long until the first is due; `None` if there is none.
    pub(super) fn first(&self) -> Option<Duration> {
        let due = self.due.borrow();
        let ((first, _), _) = due.first_key_value()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    /// Wakes those that are due.
    pub(super) fn wake(&self) {
        let mut due = self.due.borrow_mut();
        if due.is_empty() {
            return;
        }
        let later = due.split_off(&(Instant::now(), u64::MAX));
        let ripe = std::mem::replace(&mut *due, later);
        drop(due);
        ripe.into_values().for_each(Waker::wake);
    }
}

/// A wait for a moment.
pub(super) struct Sleep<'a> {
    timers: &'a Timers,
    until: Instant,
    number: Option<u64>,
}

impl<'a> Sleep<'a> {
    pub(super) fn new(timers: &'a Timers, time: Duration) -> Sleep<'a> {
        // A time that the clock can't tell is a year.
        let now = Instant::now();
        let until = now.checked_add(time).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        Sleep { timers, until, number: None }
    }
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.until {
            return Poll::Ready(());
        }
        let number = self.number.unwrap_or_else(|| {
            let number = self.timers.next.get();
            self.timers.next.set(number.wrapping_add(1));
            number
        });
        self.number = Some(number);
        self.timers.due.borrow_mut().insert((self.until, number), context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.timers.due.borrow_mut().remove(&(self.until, number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_end_in_their_order_and_dropped_ones_are_forgotten() {
        let timers = Timers::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut sleep = |ms| {
            let mut sleep = Box::pin(Sleep::new(&timers, Duration::from_millis(ms)));
            assert!(sleep.as_mut().poll(&mut context).is_pending());
            sleep
        };
        let (late, soon) = (sleep(60_000), sleep(20));
        assert!(timers.first().is_some_and(|left| left <= Duration::from_millis(20)));
        drop(soon);
        assert!(timers.first().is_some_and(|left| left > Duration::from_secs(50)));
        let mut now = sleep(1);
        std::thread::sleep(Duration::from_millis(2));
        timers.wake();
        assert!(now.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
        drop(late);
        assert_eq!(timers.first(), None);
        // Never is a long time, and no overflow.
        drop(Sleep::new(&timers, Duration::MAX));
    }
}
