//! Tasks of one thread: futures that run when woken, and wakers that work from any thread.
//!
//! A task stays on the thread that spawned it. Waking from its own thread is a push onto a local
//! queue; from another thread it goes through the inbox, and an eventfd when the thread sleeps in
//! the kernel. A task is queued at most once; waking one that has ended does nothing.

use std::{
    cell::RefCell,
    collections::VecDeque,
    future::Future,
    os::fd::{AsFd, AsRawFd, RawFd},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use nix::sys::eventfd::{EfdFlags, EventFd};
use slab::Slab;

use super::ring::Ring;

/// How long tasks run before the kernel is asked what has come meanwhile: somebody may wait for that.
const TURN: Duration = Duration::from_micros(100);

/// What runs on a thread: made elsewhere, started there.
pub(super) type Job = Box<dyn FnOnce(&Ring) + Send>;

thread_local! {
    /// The thread's own queue of tasks to run, by the id of its inbox; 0 off the ring threads.
    static LOCAL: RefCell<(u64, VecDeque<usize>)> = const { RefCell::new((0, VecDeque::new())) };
}

/// Where other threads leave work for a ring's thread.
pub(super) struct Inbox {
    id: u64,
    mail: Mutex<Mail>,
    /// The thread is about to wait in the kernel, or does.
    sleeping: AtomicBool,
    event: EventFd,
}

#[derive(Default)]
struct Mail {
    woken: Vec<usize>,
    jobs: Vec<Job>,
    stop: bool,
}

impl Inbox {
    pub(super) fn new() -> std::io::Result<Inbox> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Ok(Inbox {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            mail: Mutex::default(),
            sleeping: AtomicBool::new(false),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?,
        })
    }

    /// The eventfd that the thread waits on while it sleeps.
    pub(super) fn event(&self) -> RawFd {
        self.event.as_fd().as_raw_fd()
    }

    pub(super) fn send(&self, job: Job) {
        self.post(|mail| mail.jobs.push(job));
    }

    pub(super) fn stop(&self) {
        self.post(|mail| mail.stop = true);
    }

    fn post(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.mail.lock().unwrap_or_else(PoisonError::into_inner));
        // SeqCst pairs with `may_sleep`: either it sees the mail, or we see it asleep.
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // It can only fail when the counter is full, and then the thread is woken anyway.
            let _ = self.event.write(1);
        }
    }

    /// Announces that the thread will wait; false if there is mail, and it should look first.
    pub(super) fn may_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        let mail = self.mail.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = mail.woken.is_empty() && mail.jobs.is_empty() && !mail.stop;
        if !empty {
            self.sleeping.store(false, Ordering::SeqCst);
        }
        empty
    }

    pub(super) fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

struct Handle {
    index: usize,
    queued: AtomicBool,
    inbox: Arc<Inbox>,
}

impl Wake for Handle {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let local = LOCAL.with_borrow_mut(|(id, queue)| {
            let own = *id == self.inbox.id;
            if own {
                queue.push_back(self.index);
            }
            own
        });
        if !local {
            self.inbox.post(|mail| mail.woken.push(self.index));
        }
    }
}

type BoxedTask = Pin<Box<dyn Future<Output = ()>>>;

struct Task {
    handle: Arc<Handle>,
    waker: Waker,
    /// `None` while it runs.
    future: Option<BoxedTask>,
}

/// The tasks of one thread.
pub(super) struct Tasks {
    inbox: Arc<Inbox>,
    tasks: RefCell<Slab<Task>>,
}

impl Tasks {
    /// Takes over the calling thread's queue.
    pub(super) fn new(inbox: Arc<Inbox>) -> Tasks {
        LOCAL.with_borrow_mut(|local| *local = (inbox.id, VecDeque::new()));
        Tasks { inbox, tasks: RefCell::default() }
    }

    pub(super) fn len(&self) -> usize {
        self.tasks.borrow().len()
    }

    pub(super) fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        let entry = tasks.vacant_entry();
        let inbox = self.inbox.clone();
        let handle = Arc::new(Handle { index: entry.key(), queued: AtomicBool::new(false), inbox });
        let waker = Waker::from(handle.clone());
        entry.insert(Task { handle, waker: waker.clone(), future: Some(Box::pin(future)) });
        waker.wake();
    }

    /// Takes the mail: wakes what others woke, and returns the jobs and whether it asks to stop.
    pub(super) fn take_mail(&self) -> (Vec<Job>, bool) {
        let mut mail = self.inbox.mail.lock().unwrap_or_else(PoisonError::into_inner);
        LOCAL.with_borrow_mut(|(_, queue)| queue.extend(mail.woken.drain(..)));
        (std::mem::take(&mut mail.jobs), std::mem::take(&mut mail.stop))
    }

    /// Runs tasks that are queued, and those that they wake, for a [`TURN`]: whether none is left.
    pub(super) fn run(&self) -> bool {
        let start = Instant::now();
        while start.elapsed() < TURN {
            let next = LOCAL.with_borrow_mut(|(_, queue)| queue.pop_front());
            let Some(index) = next else { return true };
            let Some((waker, mut future)) = self.take(index) else { continue };
            let poll = || future.as_mut().poll(&mut Context::from_waker(&waker));
            match catch_unwind(AssertUnwindSafe(poll)) {
                Ok(Poll::Pending) => self.tasks.borrow_mut()[index].future = Some(future),
                Ok(Poll::Ready(())) => drop(self.tasks.borrow_mut().remove(index)),
                // A bug of ours: it costs this task, not the other clients of the thread. The
                // panic's message went to the log; what the task held is told by its guards.
                Err(_) => drop(self.tasks.borrow_mut().remove(index)),
            }
        }
        LOCAL.with_borrow(|(_, queue)| queue.is_empty())
    }

    fn take(&self, index: usize) -> Option<(Waker, BoxedTask)> {
        let mut tasks = self.tasks.borrow_mut();
        let task = tasks.get_mut(index)?;
        task.handle.queued.store(false, Ordering::Release);
        let future = task.future.take()?;
        Some((task.waker.clone(), future))
    }
}
