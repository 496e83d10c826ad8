//! The tasks of a simulated node, and the order in which things happen to them.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
};

use super::Sim;

/// A task on the simulated node.
pub type Task<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Every task ended; this many operations completed.
    Done(u64),
    /// The step asked for was reached: the tasks are gone, operations may be in flight.
    Stopped,
    /// Tasks wait for nothing that could come: they lock each other out.
    Stuck,
}

struct Wakeup {
    task: usize,
    queued: AtomicBool,
    ready: Arc<Mutex<Vec<usize>>>,
}

impl Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::SeqCst) {
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(self.task);
        }
    }
}

impl Sim {
    /// Runs `tasks` until all have ended or, after `steps` completed operations, stops dead.
    pub fn run(&self, tasks: Vec<Task<'_>>, steps: Option<u64>) -> End {
        let ready = Arc::new(Mutex::new(Vec::new()));
        let mut tasks: Vec<_> = tasks
            .into_iter()
            .enumerate()
            .map(|(task, future)| {
                let queued = AtomicBool::new(false);
                let wakeup = Arc::new(Wakeup { task, queued, ready: ready.clone() });
                wakeup.clone().wake();
                Some((future, wakeup))
            })
            .collect();
        let mut completed = 0;
        loop {
            let next = {
                let mut ready = ready.lock().unwrap_or_else(PoisonError::into_inner);
                let mut world = self.0.borrow_mut();
                let idle = world.completable().next().is_none();
                match ready.len() {
                    0 if idle && tasks.iter().all(Option::is_none) => return End::Done(completed),
                    0 if idle => return End::Stuck,
                    0 => None,
                    count if idle || world.rng.bool() => {
                        Some(ready.swap_remove(world.rng.usize(0..count)))
                    }
                    _ => None,
                }
            };
            let Some(index) = next else {
                if steps.is_some_and(|steps| completed >= steps) {
                    return End::Stopped;
                }
                let mut world = self.0.borrow_mut();
                let count = world.completable().count();
                let chosen = world.rng.usize(0..count);
                let chosen = world.completable().nth(chosen).expect("one of those counted");
                world.complete(chosen);
                completed += 1;
                continue;
            };
            if let Some((future, wakeup)) = &mut tasks[index] {
                wakeup.queued.store(false, Ordering::SeqCst);
                let waker = Waker::from(wakeup.clone());
                if future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                    tasks[index] = None;
                }
            }
        }
    }

    /// Runs one task to its end and returns what it returned; `None` if it got stuck, or if it had
    /// not ended after `steps` completed operations.
    pub fn run_one<T>(&self, task: impl Future<Output = T>, steps: Option<u64>) -> Option<T> {
        let mut result = None;
        let slot = &mut result;
        self.run(vec![Box::pin(async move { *slot = Some(task.await) })], steps);
        result
    }
}
