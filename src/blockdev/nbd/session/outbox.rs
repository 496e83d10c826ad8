//! What is to be sent: replies one after the other, each at once or in parts that come as they are ready.
//!
//! Invariant: from the first part of a reply to its last, nothing else is sent.

use std::{cell::Cell, cell::RefCell, collections::VecDeque, rc::Rc};

use crate::io::batch::Part;

/// A reply or a part of one, and what its sending gives back.
pub(super) struct Parcel {
    pub(super) part: Part,
    /// Bytes of the request's credit, if this is the end of its reply.
    pub(super) credit: Option<usize>,
    /// Where the part is counted while it is in memory.
    pub(super) window: Option<Window>,
}

/// Parts of one request that are in memory.
pub(super) type Window = Rc<Cell<usize>>;

/// Parts of a reply that are ready, in their order.
pub(super) type Parts = Rc<RefCell<VecDeque<Parcel>>>;

enum Entry {
    Whole(Parcel),
    /// The last of them has credit to give back.
    InParts(Parts),
}

#[derive(Default)]
pub(super) struct Outbox(VecDeque<Entry>);

impl Outbox {
    /// A reply, or a part that others may come before and after.
    pub(super) fn push(&mut self, parcel: Parcel) {
        self.0.push_back(Entry::Whole(parcel));
    }

    /// The place of a reply in parts, which come by and by.
    pub(super) fn begin(&mut self) -> Parts {
        let parts = Parts::default();
        self.0.push_back(Entry::InParts(parts.clone()));
        parts
    }

    /// Whether there is something that can be sent now.
    pub(super) fn is_ready(&self) -> bool {
        match self.0.front() {
            Some(Entry::Whole(_)) => true,
            Some(Entry::InParts(parts)) => !parts.borrow().is_empty(),
            None => false,
        }
    }

    /// What is to be sent next, if it is ready.
    pub(super) fn pop(&mut self) -> Option<Parcel> {
        if let Entry::InParts(parts) = self.0.front()? {
            let parcel = parts.borrow_mut().pop_front()?;
            if parcel.credit.is_some() {
                self.0.pop_front();
            }
            return Some(parcel);
        }
        match self.0.pop_front()? {
            Entry::Whole(parcel) => Some(parcel),
            Entry::InParts(_) => unreachable!("looked at above"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parcel(len: usize, credit: Option<usize>) -> Parcel {
        Parcel { part: Part::new(&vec![0; len], None), credit, window: None }
    }

    #[test]
    fn nothing_comes_between_the_parts_of_a_reply() {
        let mut outbox = Outbox::default();
        let mut sent = Vec::new();
        let mut send = |outbox: &mut Outbox| {
            assert_eq!(outbox.is_ready(), {
                let next = outbox.pop();
                sent.extend(next.iter().map(|parcel| parcel.part.len()));
                next.is_some()
            });
            sent.clone()
        };
        outbox.push(parcel(1, Some(0)));
        let (first, second) = (outbox.begin(), outbox.begin());
        outbox.push(parcel(9, Some(0)));
        second.borrow_mut().push_back(parcel(4, None));
        assert_eq!(send(&mut outbox), [1]);
        assert_eq!(send(&mut outbox), [1], "the first reply's turn");
        first.borrow_mut().push_back(parcel(2, None));
        assert_eq!(send(&mut outbox), [1, 2]);
        assert_eq!(send(&mut outbox), [1, 2]);
        first.borrow_mut().push_back(parcel(3, Some(7)));
        assert_eq!(send(&mut outbox), [1, 2, 3]);
        assert_eq!(send(&mut outbox), [1, 2, 3, 4]);
        assert_eq!(send(&mut outbox), [1, 2, 3, 4]);
        second.borrow_mut().push_back(parcel(5, Some(7)));
        for expected in [&[1, 2, 3, 4, 5][..], &[1, 2, 3, 4, 5, 9], &[1, 2, 3, 4, 5, 9]] {
            assert_eq!(send(&mut outbox), expected);
        }
    }
}
