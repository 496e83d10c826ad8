//! The ring threads of a daemon, as the rest of the program sees them.

use std::{
    future::Future,
    io::Result,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{ring::Ring, task::Inbox};

/// Threads with a ring each. Dropping it asks them to end once their tasks have.
pub struct Rings {
    threads: Vec<Thread>,
    next: AtomicUsize,
}

struct Thread {
    inbox: Arc<Inbox>,
    handle: Option<JoinHandle<()>>,
}

impl Rings {
    /// Starts `count` threads, each of which looks for completions for at most `poll` before it
    /// sleeps.
    ///
    /// # Errors
    /// Whatever io_uring says, where the kernel is too old or forbids it.
    pub fn start(count: usize, poll: Duration) -> Result<Rings> {
        let mut rings = Rings { threads: Vec::new(), next: AtomicUsize::new(0) };
        for index in 0..count.max(1) {
            let inbox = Arc::new(Inbox::new()?);
            let (ready, started) = mpsc::channel();
            let own = inbox.clone();
            let handle =
                std::thread::Builder::new().name(format!("ring{index}")).spawn(move || {
                    match Ring::new(own, poll) {
                        Ok(ring) => {
                            let _ = ready.send(Ok(()));
                            if let Err(error) = ring.run() {
                                tracing::error!(%error, "a ring failed: the daemon ends here, the \
                                    next one goes on where it stopped");
                                // Nothing that it serves is ever answered, and the kernel may still
                                // write to what its operations keep.
                                std::process::abort();
                            }
                        }
                        Err(error) => {
                            let _ = ready.send(Err(error));
                        }
                    }
                })?;
            rings.threads.push(Thread { inbox, handle: Some(handle) });
            started.recv().unwrap_or_else(|_| Err(std::io::ErrorKind::BrokenPipe.into()))?;
        }
        Ok(rings)
    }

    /// How many threads there are.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// A thread's number, each in turn.
    pub fn pick(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) % self.threads.len()
    }

    /// Starts a task on a thread; `make` runs there.
    pub fn spawn<F>(&self, thread: usize, make: impl FnOnce(Ring) -> F + Send + 'static)
    where
        F: Future<Output = ()> + 'static,
    {
        let job = move |ring: &Ring| ring.spawn(make(ring.clone()));
        self.threads[thread % self.threads.len()].inbox.send(Box::new(job));
    }

    /// Runs a future on a thread and returns its result; `None` if the thread is gone. The future
    /// runs to its end even if nobody waits any more.
    pub async fn run<T, F>(
        &self,
        thread: usize,
        make: impl FnOnce(Ring) -> F + Send + 'static,
    ) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (done, result) = oneshot::channel();
        self.spawn(thread, move |ring| {
            let future = make(ring);
            async move {
                // The caller may have gone; the work was done all the same.
                let _ = done.send(future.await);
            }
        });
        result.await.ok()
    }

    /// Asks every thread to end once its tasks have, and waits until `limit`. Whether all ended.
    pub fn stop(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        self.threads.iter().for_each(|thread| thread.inbox.stop());
        self.threads.iter_mut().all(|thread| {
            let Some(handle) = thread.handle.take() else { return true };
            while !handle.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            handle.is_finished() && handle.join().is_ok()
        })
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        self.threads.iter().for_each(|thread| thread.inbox.stop());
    }
}

#[cfg(test)]
mod tests {
    //! Invariants checked: files written through one ring read back through another; ends of files
    //! read as zeros; dropped operations keep their memory; work from other threads arrives.

    use super::*;
    use crate::io::{Buf, Io, RingFile};

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn scratch() -> RingFile {
        RingFile::new(tempfile::tempfile().unwrap()).unwrap()
    }

    #[test]
    fn writes_of_one_thread_are_read_on_another() {
        let mut rings = Rings::start(2, Duration::ZERO).unwrap();
        let file = scratch();
        let own = file.clone();
        let write = rings.run(0, |ring| async move {
            let buf = ring.alloc(10_000);
            buf.fill(7);
            ring.write(&own, buf, 5000).await?;
            ring.punch(&own, 8192..12288).await?;
            ring.sync(&own).await
        });
        block_on(write).unwrap().unwrap();
        let read = rings.run(1, |ring| async move {
            let buf = ring.alloc(20_000);
            buf.fill(9);
            ring.read(&file, buf.clone(), 0).await?;
            Ok::<_, std::io::Error>((buf.to_vec(), ring.data_after(&file, 1 << 20).await?))
        });
        let (bytes, after) = block_on(read).unwrap().unwrap();
        for (offset, byte) in bytes.into_iter().enumerate() {
            let written = (5000..15_000).contains(&offset) && !(8192..12288).contains(&offset);
            assert_eq!(byte, if written { 7 } else { 0 }, "byte {offset}");
        }
        assert_eq!(after, None);
        assert!(rings.stop(Duration::from_secs(5)));
    }

    #[test]
    fn tasks_wake_across_threads() {
        let mut rings = Rings::start(2, Duration::ZERO).unwrap();
        let (send, receive) = oneshot::channel();
        let (done, result) = oneshot::channel();
        rings.spawn(0, move |_| async move {
            let _ = done.send(receive.await);
        });
        rings.spawn(1, move |ring| async move {
            let file = scratch();
            ring.write(&file, Buf::from_bytes(b"hello"), 0).await.unwrap();
            let _ = send.send(5);
        });
        assert_eq!(block_on(result).unwrap(), Ok(5));
        assert!(rings.stop(Duration::from_secs(5)));
    }

    #[test]
    fn a_dropped_operation_keeps_its_buffer() {
        let mut rings = Rings::start(1, Duration::ZERO).unwrap();
        let result = rings.run(0, |ring| async move {
            let (reader, writer) = nix::unistd::pipe().unwrap();
            let file = RingFile::new(reader.into()).unwrap();
            let buf = ring.alloc(4096);
            buf.fill(1);
            {
                let mut read = Box::pin(ring.read(&file, buf.clone(), u64::MAX));
                let waker = std::task::Waker::noop();
                assert!(
                    read.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending()
                );
            }
            nix::unistd::write(&writer, &[2; 100]).unwrap();
            let other = scratch();
            ring.write(&other, Buf::from_bytes(b"x"), 0).await.unwrap();
            ring.sync(&other).await.unwrap();
            buf.to_vec()
        });
        let bytes = block_on(result).unwrap();
        assert!(bytes[..100] == [2; 100] || bytes[..100] == [1; 100]);
        assert!(rings.stop(Duration::from_secs(5)));
    }
}
