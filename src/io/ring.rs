//! io_uring: the [`Io`] of guests, and the socket operations of their front ends.
//!
//! One ring a thread. Operations are futures; each owns an entry of the slab until the kernel has
//! completed it, and the entry keeps what the kernel may touch: the buffer, the file, the message.
//! A future that is dropped early leaves its entry behind, and the completion frees it.
//!
//! Submissions gather while tasks run and go to the kernel some at a time, so that the disk begins
//! while the rest is made ready; the last go with the wait for the next completions.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io::{Error, ErrorKind, Result},
    ops::Range,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::fs::FileTypeExt,
    },
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use io_uring::{IoUring, opcode, squeue, types};
use nix::{
    fcntl::{FallocateFlags, OFlag},
    unistd::Whence,
};
use slab::Slab;

use super::{
    Buf, Io,
    batch::Batch,
    buf::{POOL, Pool},
    poll::Poll as Polling,
    sys,
    task::{Inbox, Tasks},
    timers::{Sleep, Timers},
};

/// Entries of the submission queue; the completion queue has twice as many.
const ENTRIES: u32 = 512;

/// Submissions that go to the kernel at once.
const GATHER: usize = 8;

/// Kernel threads that may work for a ring on what can't be done at once (syncs, for the most part). By
/// default there are four a processor: those that wait for a disk that hangs would be all of them.
const WORKERS: u32 = 512;

/// Bytes of one read or write: the kernel caps them a little below 2 GiB.
const MAX_IO: usize = 1 << 30;

/// Buffers that the kernel may lend to one ring at a time: so many requests of block devices of its
/// own can be under way. It takes 8 bytes for each.
const LOANS: u16 = 8192;

/// `user_data` of the wait for other threads' mail.
const MAIL: u64 = u64::MAX;

/// A file that rings read and write, from any thread.
#[derive(Clone, Debug)]
pub struct RingFile(Arc<FileInner>);

#[derive(Debug)]
struct FileInner {
    fd: OwnedFd,
    align: u64,
}

impl RingFile {
    /// Takes over an open file or block device. Its alignment is the device's if it was opened
    /// with `O_DIRECT`.
    pub fn new(file: std::fs::File) -> Result<RingFile> {
        let flags = OFlag::from_bits_retain(nix::fcntl::fcntl(&file, nix::fcntl::F_GETFL)?);
        let align = if flags.contains(OFlag::O_DIRECT) { direct_align(&file)? } else { 1 };
        Ok(RingFile(Arc::new(FileInner { fd: file.into(), align })))
    }

    /// The file's alignment of offsets, lengths and memory, in bytes; 1 when buffered.
    pub fn align(&self) -> u64 {
        self.0.align
    }

    fn fd(&self) -> RawFd {
        self.0.fd.as_raw_fd()
    }
}

/// What direct I/O on this file must be aligned to, as the kernel tells (statx, since 6.1).
fn direct_align(file: &std::fs::File) -> Result<u64> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(4096);
    }
    Ok(super::sys::direct_align(file)?.unwrap_or(4096).max(512))
}

/// A thread's ring, buffers and tasks. Cloning it gives another handle on the same.
#[derive(Clone)]
pub struct Ring(Rc<Inner>);

struct Inner {
    uring: RefCell<IoUring>,
    ops: RefCell<Slab<Op>>,
    pool: Pool,
    tasks: Tasks,
    inbox: Arc<Inbox>,
    mail: Buf,
    mail_armed: Cell<bool>,
    /// Numbers of the table of buffers under which nothing is lent.
    loans: RefCell<Vec<u16>>,
    polling: Polling,
    timers: Timers,
    /// Operations on files that the kernel has not completed.
    disk_ops: Cell<usize>,
}

struct Op {
    state: State,
    keep: Keep,
}

enum State {
    Pending(Option<Waker>),
    Done(i32),
    Abandoned,
}

/// What the kernel may touch while an operation is in flight. Mostly held, not read.
#[expect(dead_code, reason = "holding it is its use")]
enum Keep {
    File(RingFile),
    Buf(RingFile, Buf),
    Recv(Arc<OwnedFd>, Buf),
    Send(Arc<OwnedFd>, Box<Batch>),
    Command(Arc<std::fs::File>, Option<Buf>),
}

impl Keep {
    fn is_disk(&self) -> bool {
        matches!(self, Keep::File(_) | Keep::Buf(..))
    }
}

impl Ring {
    /// Makes the calling thread a ring thread, which looks for completions for at most `poll`
    /// before it sleeps.
    pub(super) fn new(inbox: Arc<Inbox>, poll: Duration) -> Result<Ring> {
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(ENTRIES)?;
        // An old kernel keeps its default.
        let _ = uring.submitter().register_iowq_max_workers(&mut [WORKERS, 0]);
        let table = uring.submitter().register_buffers_sparse(u32::from(LOANS) + 1).is_ok();
        let pool = Pool::new(|start, len| {
            let region = libc::iovec { iov_base: start.cast(), iov_len: len };
            let at = u32::from(POOL);
            // SAFETY: the region lives as long as any slot of it, the pool keeps its slots, and
            // the ring is declared before the pool, so it is closed first.
            table
                && unsafe { uring.submitter().register_buffers_update(at, &[region], None) }.is_ok()
        });
        let loans = if table { (POOL + 1..=LOANS).rev().collect() } else { Vec::new() };
        Ok(Ring(Rc::new(Inner {
            uring: RefCell::new(uring),
            ops: RefCell::default(),
            pool,
            tasks: Tasks::new(inbox.clone()),
            inbox,
            mail: Buf::heap(8),
            mail_armed: Cell::new(false),
            loans: RefCell::new(loans),
            polling: Polling::new(poll),
            timers: Timers::default(),
            disk_ops: Cell::new(0),
        })))
    }

    /// Starts a task on this thread.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.0.tasks.spawn(future);
    }

    /// Runs tasks and operations until told to stop and nothing is left under way.
    pub(super) fn run(&self) -> Result<()> {
        let inner = &*self.0;
        let mut stopping = false;
        loop {
            let (jobs, stop) = inner.tasks.take_mail();
            stopping |= stop;
            for job in jobs {
                // A bug in one is not to end the thread: see `Tasks::run`.
                let _ = catch_unwind(AssertUnwindSafe(|| job(self)));
            }
            let all = inner.tasks.run();
            if stopping && inner.tasks.len() == 0 && inner.ops.borrow().is_empty() {
                return Ok(());
            }
            self.arm_mail()?;
            let idle = all && inner.inbox.may_sleep();
            if idle && let Some(habit) = inner.polling.wanted(inner.disk_ops.get()) {
                self.enter(0)?;
                habit.look(|| {
                    let mut uring = inner.uring.borrow_mut();
                    uring.submission().taskrun() || !uring.completion().is_empty()
                });
            }
            self.enter(usize::from(idle))?;
            inner.inbox.awake();
            self.reap();
            inner.timers.wake();
        }
    }

    /// Submits what has gathered and waits for so many completions, or until a timer is due.
    fn enter(&self, wait: usize) -> Result<()> {
        let uring = self.0.uring.borrow();
        let until = if wait > 0 { self.0.timers.first() } else { None };
        let entered = match until {
            None => uring.submit_and_wait(wait),
            Some(time) => {
                let time = types::Timespec::from(time);
                let args = types::SubmitArgs::new().timespec(&time);
                uring.submitter().submit_with_args(wait, &args)
            }
        };
        match entered {
            Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
            Err(error) => for_now(error),
            Ok(_) => Ok(()),
        }
    }

    fn arm_mail(&self) -> Result<()> {
        if self.0.mail_armed.replace(true) {
            return Ok(());
        }
        let event = types::Fd(self.0.inbox.event());
        let entry = opcode::Read::new(event, self.0.mail.as_ptr(), 8).build().user_data(MAIL);
        self.push(&entry)
    }

    fn push(&self, entry: &squeue::Entry) -> Result<()> {
        let mut uring = self.0.uring.borrow_mut();
        // SAFETY: what the entry points at is kept by its operation's slab entry, or by the ring
        // itself for the mail, until the completion is reaped.
        while unsafe { uring.submission().push(entry) }.is_err() {
            let Err(error) = uring.submit() else { continue };
            for_now(error)?;
            // It may be for want of room for completions.
            drop(uring);
            self.reap();
            uring = self.0.uring.borrow_mut();
        }
        if uring.submission().len() >= GATHER {
            // What the kernel does not take now stays in the queue, and goes with the next call.
            let _ = uring.submit();
        }
        Ok(())
    }

    fn reap(&self) {
        let mut uring = self.0.uring.borrow_mut();
        let mut ops = self.0.ops.borrow_mut();
        for completion in uring.completion() {
            if completion.user_data() == MAIL {
                self.0.mail_armed.set(false);
                continue;
            }
            let key = completion.user_data() as usize;
            let Some(op) = ops.get_mut(key) else { continue };
            if op.keep.is_disk() {
                self.0.disk_ops.set(self.0.disk_ops.get() - 1);
            }
            match std::mem::replace(&mut op.state, State::Done(completion.result())) {
                State::Pending(Some(waker)) => waker.wake(),
                State::Abandoned => drop(ops.remove(key)),
                State::Pending(None) | State::Done(_) => {}
            }
        }
    }

    fn start(&self, entry: squeue::Entry, keep: Keep) -> Operation {
        let disk = usize::from(keep.is_disk());
        let key = self.0.ops.borrow_mut().insert(Op { state: State::Pending(None), keep });
        self.0.disk_ops.set(self.0.disk_ops.get() + disk);
        if disk > 0 {
            self.0.polling.disk_is_asked();
        }
        if let Err(error) = self.push(&entry.user_data(key as u64)) {
            self.0.disk_ops.set(self.0.disk_ops.get() - disk);
            // The kernel refused the whole ring: every operation fails the same way.
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.0.ops.borrow_mut()[key].state = State::Done(-errno);
        }
        Operation { ring: self.clone(), key: Some(key) }
    }

    /// Numbers under which the kernel may lend memory to this ring; `None` when so many are not to
    /// be had. They are given back by [`Ring::give_back`].
    pub(crate) fn borrow_numbers(&self, count: usize) -> Option<Vec<u16>> {
        let mut loans = self.0.loans.borrow_mut();
        let rest = loans.len().checked_sub(count)?;
        Some(loans.split_off(rest))
    }

    /// Gives numbers back under which nothing is lent any more.
    pub(crate) fn give_back(&self, numbers: Vec<u16>) {
        self.0.loans.borrow_mut().extend(numbers);
    }

    /// Gives a command to the driver behind `file`, and waits for its answer. Its address field says
    /// where the driver may copy data from and to, until it answers.
    pub(crate) async fn command(
        &self,
        file: &Arc<std::fs::File>,
        number: u32,
        command: [u8; 16],
        address: Address,
    ) -> Result<usize> {
        let fd = types::Fd(file.as_raw_fd());
        let mut entry = opcode::UringCmd16::new(fd, number).cmd(command).build();
        let (value, buf) = match address {
            Address::Number(number) => (u64::from(number), None),
            Address::Memory(buf) => (0, Some(buf)),
        };
        // SAFETY: the entry is 64 bytes, 8 at offset 16 are its address field, for which the crate
        // has no setter, and any value of it is valid.
        unsafe { (&raw mut entry).cast::<u8>().add(16).cast::<u64>().write(value) };
        self.start(entry, Keep::Command(file.clone(), buf)).await.0
    }

    async fn file_op(&self, entry: squeue::Entry, file: &RingFile) -> Result<()> {
        let (result, _) = self.start(entry, Keep::File(file.clone())).await;
        result.map(|_| ())
    }

    /// Receives at least one byte into `buf`; 0 at the end of the stream.
    pub async fn recv(&self, socket: &Arc<OwnedFd>, buf: Buf) -> Result<usize> {
        let fd = types::Fd(socket.as_raw_fd());
        let len = buf.len().min(MAX_IO) as u32;
        let entry = opcode::Recv::new(fd, buf.as_ptr(), len).build();
        self.start(entry, Keep::Recv(socket.clone(), buf)).await.0
    }

    /// Fills `buf` from the stream; an early end is `UnexpectedEof`.
    pub async fn recv_exact(&self, socket: &Arc<OwnedFd>, buf: Buf) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let fd = types::Fd(socket.as_raw_fd());
            let rest = buf.slice(done..buf.len());
            let entry = opcode::Recv::new(fd, rest.as_ptr(), rest.len().min(MAX_IO) as u32)
                .flags(libc::MSG_WAITALL)
                .build();
            match self.start(entry, Keep::Recv(socket.clone(), rest)).await.0? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Sends all of the batch, and returns it for the next.
    pub async fn send(
        &self,
        socket: &Arc<OwnedFd>,
        mut batch: Box<Batch>,
    ) -> (Result<()>, Box<Batch>) {
        // Most often there is room for all of it.
        match sys::send_now(socket.as_raw_fd(), &mut batch) {
            Err(error) if !again(&error) => return (Err(error), batch),
            _ => {}
        }
        while batch.left() > 0 {
            let fd = types::Fd(socket.as_raw_fd());
            let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
            let entry = opcode::SendMsg::new(fd, batch.message()).flags(flags).build();
            let (result, keep) = self.start(entry, Keep::Send(socket.clone(), batch)).await;
            let Keep::Send(_, back) = keep else { unreachable!("the operation's own keep") };
            batch = back;
            match result {
                Ok(sent) => batch.advance(sent),
                Err(error) => return (Err(error), batch),
            }
        }
        (Ok(()), batch)
    }
}

/// What the address field of a driver's command says.
pub(crate) enum Address {
    /// A number of the ring's table of buffers, or whatever else the driver takes it for.
    Number(u16),
    /// The command holds an address within this memory.
    Memory(Buf),
}

/// An operation in flight.
struct Operation {
    ring: Ring,
    /// `None` once the result was taken.
    key: Option<usize>,
}

impl Future for Operation {
    type Output = (Result<usize>, Keep);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("an operation is not polled after its end");
        let mut ops = self.ring.0.ops.borrow_mut();
        let op = &mut ops[key];
        match &mut op.state {
            State::Pending(waker) => {
                match waker {
                    Some(old) if old.will_wake(context.waker()) => {}
                    _ => *waker = Some(context.waker().clone()),
                }
                Poll::Pending
            }
            State::Done(result) => {
                let result = match *result {
                    n if n < 0 => Err(Error::from_raw_os_error(-n)),
                    n => Ok(n as usize),
                };
                let keep = ops.remove(key).keep;
                drop(ops);
                self.key = None;
                Poll::Ready((result, keep))
            }
            State::Abandoned => unreachable!("abandoned only by its own future"),
        }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut ops = self.ring.0.ops.borrow_mut();
        match ops[key].state {
            State::Done(_) => drop(ops.remove(key)),
            _ => ops[key].state = State::Abandoned,
        }
    }
}

/// The error of a submission, unless the kernel only asks for another: a signal came, completions are
/// to be reaped first, or it lacks memory now.
pub(super) fn for_now(error: Error) -> Result<()> {
    match error.raw_os_error() {
        Some(libc::EINTR | libc::EBUSY) => Ok(()),
        Some(libc::EAGAIN) => {
            std::thread::yield_now();
            Ok(())
        }
        _ => Err(error),
    }
}

/// Whether the call should simply be made again.
fn again(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

impl Io for Ring {
    type File = RingFile;

    fn alloc(&self, len: usize) -> Buf {
        self.0.pool.alloc(len)
    }

    fn align(&self, file: &RingFile) -> u64 {
        file.align()
    }

    async fn read(&self, file: &RingFile, buf: Buf, offset: u64) -> Result<()> {
        let fd = types::Fd(file.fd());
        // What is in the page cache is copied at once: that is less work than an operation of the ring's.
        let mut done = match file.align() {
            1 => sys::read_cached(file.fd(), &buf, offset),
            _ => 0,
        };
        while done < buf.len() {
            let rest = buf.slice(done..buf.len());
            let (at, len) = (offset + done as u64, rest.len().min(MAX_IO) as u32);
            let entry = match rest.registered() {
                Some(index) => {
                    opcode::ReadFixed::new(fd, rest.as_ptr(), len, index).offset(at).build()
                }
                None => opcode::Read::new(fd, rest.as_ptr(), len).offset(at).build(),
            };
            match self.start(entry, Keep::Buf(file.clone(), rest.clone())).await.0 {
                Ok(0) => {
                    rest.fill(0);
                    return Ok(());
                }
                Ok(n) => done += n,
                Err(error) if again(&error) => continue,
                Err(error) => return Err(error),
            }
            if done < buf.len() && !(done as u64).is_multiple_of(file.align()) {
                // A direct read is cut within a device block by the end of the file only.
                buf.slice(done..buf.len()).fill(0);
                return Ok(());
            }
        }
        Ok(())
    }

    async fn write(&self, file: &RingFile, buf: Buf, offset: u64) -> Result<()> {
        let fd = types::Fd(file.fd());
        let mut done = 0;
        while done < buf.len() {
            let rest = buf.slice(done..buf.len());
            let (at, len) = (offset + done as u64, rest.len().min(MAX_IO) as u32);
            let entry = match rest.registered() {
                Some(index) => {
                    opcode::WriteFixed::new(fd, rest.as_ptr(), len, index).offset(at).build()
                }
                None => opcode::Write::new(fd, rest.as_ptr(), len).offset(at).build(),
            };
            match self.start(entry, Keep::Buf(file.clone(), rest)).await.0 {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(error) if again(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn sync(&self, file: &RingFile) -> Result<()> {
        let entry =
            opcode::Fsync::new(types::Fd(file.fd())).flags(types::FsyncFlags::DATASYNC).build();
        self.file_op(entry, file).await
    }

    async fn punch(&self, file: &RingFile, range: Range<u64>) -> Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(file, mode, range).await
    }

    async fn zero(&self, file: &RingFile, range: Range<u64>) -> Result<()> {
        let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate(file, mode, range).await
    }

    async fn set_len(&self, file: &RingFile, len: u64) -> Result<()> {
        // Growing happens once in a replica's life: not worth an operation that only new kernels have.
        let len = i64::try_from(len).map_err(|_| Error::from_raw_os_error(libc::EFBIG))?;
        Ok(nix::unistd::ftruncate(&file.0.fd, len)?)
    }

    async fn prefetch(&self, file: &RingFile, range: Range<u64>) -> Result<()> {
        let len = (range.end - range.start).min(u64::from(u32::MAX)) as i64;
        let entry = opcode::Fadvise::new(types::Fd(file.fd()), len, libc::POSIX_FADV_WILLNEED)
            .offset(range.start)
            .build();
        self.file_op(entry, file).await
    }

    async fn sleep(&self, time: Duration) {
        Sleep::new(&self.0.timers, time).await;
    }

    async fn data_after(&self, file: &RingFile, offset: u64) -> Result<Option<Range<u64>>> {
        // Asked when a file is opened only; it reads the inode's extents, not the disk's data.
        let seek = |at: u64, whence| {
            let at = i64::try_from(at).map_err(|_| nix::Error::ENXIO)?;
            nix::unistd::lseek(&file.0.fd, at, whence)
        };
        let start = match seek(offset, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(nix::Error::ENXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = seek(start, Whence::SeekHole)? as u64;
        Ok(Some(start..end))
    }
}

impl Ring {
    /// `fallocate`, or plain zeros where the file system has no word for it.
    async fn fallocate(
        &self,
        file: &RingFile,
        mode: FallocateFlags,
        range: Range<u64>,
    ) -> Result<()> {
        let entry = opcode::Fallocate::new(types::Fd(file.fd()), range.end - range.start)
            .offset(range.start)
            .mode(mode.bits())
            .build();
        match self.file_op(entry, file).await {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            result => return result,
        }
        let zeros = Buf::heap((range.end - range.start).min(1 << 20) as usize);
        let mut offset = range.start;
        while offset < range.end {
            let len = (range.end - offset).min(zeros.len() as u64);
            self.write(file, zeros.slice(0..len as usize), offset).await?;
            offset += len;
        }
        Ok(())
    }
}
