//! Waiting, within one thread, until something has changed.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    task::{Poll, Waker},
};

/// Wakes the tasks of this thread that wait for a condition, so that they look again.
#[derive(Default)]
pub struct Signal(RefCell<Vec<Waker>>);

impl Signal {
    /// A signal that nobody waits for.
    pub fn new() -> Signal {
        Signal::default()
    }

    /// Something changed: whoever waits looks again.
    pub fn notify(&self) {
        for waker in self.0.borrow_mut().drain(..) {
            waker.wake();
        }
    }

    /// Waits until `condition` holds; it is looked at now and after every [`Signal::notify`].
    pub fn wait(&self, condition: impl Fn() -> bool) -> impl Future<Output = ()> {
        poll_fn(move |context| {
            if condition() {
                return Poll::Ready(());
            }
            let mut waiting = self.0.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
    }
}
