//! A device of the kernel's NBD client, and the sessions of our own server that serve it.
//!
//! Connections are pairs of sockets: one end is a session's from the start, without a handshake, the
//! other the kernel's. So a session's end is seen here, whoever caused it, and answered by a new
//! connection; only when the kernel says that the device is no longer attached, that is the end.
//!
//! Invariant: the kernel gets a new connection after the session of the old one has ended, and with
//! it every request of then: none is served twice at once.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    task::{JoinSet, spawn_blocking},
    time::{sleep, timeout},
};

use super::{Choice, Client, Links, Setup, device, node};
use crate::{
    blockdev::{
        Export,
        nbd::{Line, Pair, Server},
    },
    error::{Error, Kind, Result},
};

/// How long the kernel may take over a command: it waits for requests under way.
const COMMAND: Duration = Duration::from_secs(100);
/// How long sessions may take to end once the kernel has let go of them.
const END: Duration = Duration::from_secs(10);
/// The pause before a connection is replaced: doubled while new ones don't last.
const PAUSE: Duration = Duration::from_millis(10);
const LONG_PAUSE: Duration = Duration::from_secs(1);

/// A device of the kernel's NBD client that this process serves.
pub struct NbdDevice {
    index: u32,
    setup: Setup,
    /// What its keeper is to do when a session ends.
    orders: watch::Sender<Orders>,
    /// Its connections, some ended.
    lines: Lines,
    /// Its keeper holds a receiver until the last session has ended.
    life: watch::Sender<()>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Orders {
    /// Replace its connection.
    Keep,
    /// Wait for other orders.
    Wait,
    /// Replace none: the device is gone.
    End,
}

type Lines = Arc<Mutex<Vec<Line>>>;

/// What serves a device.
#[derive(Clone)]
pub struct Service {
    /// Our own server.
    pub server: Arc<Server>,
    /// What it serves.
    pub export: Arc<Export>,
}

impl NbdDevice {
    /// Makes a device with this number, which nobody uses.
    ///
    /// # Errors
    /// `InUse` if somebody does.
    pub async fn add(
        service: Service,
        index: u32,
        setup: Setup,
        connections: usize,
    ) -> Result<NbdDevice> {
        let (lines, what) = (Lines::default(), setup.clone());
        let (links, sessions) = service.connect(connections, &lines)?;
        command(move |client| client.connect(Choice::Number(index), &what, links)).await?;
        Ok(NbdDevice::kept(service, index, setup, lines, sessions))
    }

    /// Takes over the device of this number, whose former connections have ended, or end just now.
    ///
    /// # Errors
    /// `NotFound` if it is not attached to what `setup` says.
    pub async fn take_over(
        service: Service,
        index: u32,
        setup: Setup,
        connections: usize,
    ) -> Result<NbdDevice> {
        let (lines, what) = (Lines::default(), setup.clone());
        let (links, sessions) = service.connect(connections, &lines)?;
        let export = service.export.clone();
        command(move |client| client.reconnect(index, &what, links)).await?;
        let device = NbdDevice::kept(service, index, setup, lines, sessions);
        // It may have grown just before the former server went.
        if let Err(error) = device.resize(export.device.info().size).await {
            let device = device.path();
            tracing::warn!(device, %error, "it is served, at its old size; `underlay replica resize` \
                to its size of now tells the kernel again");
        }
        Ok(device)
    }

    fn kept(
        service: Service,
        index: u32,
        setup: Setup,
        lines: Lines,
        sessions: JoinSet<()>,
    ) -> NbdDevice {
        let (orders, life) = (watch::Sender::new(Orders::Keep), watch::Sender::default());
        let keeper = Keeper {
            service,
            index,
            setup: setup.clone(),
            lines: lines.clone(),
            orders: orders.subscribe(),
            _alive: life.subscribe(),
        };
        tokio::spawn(keeper.keep(sessions));
        NbdDevice { index, setup, orders, lines, life }
    }

    /// The path of its node.
    pub fn path(&self) -> String {
        node(self.index).display().to_string()
    }

    /// Goes with the device: it is closed when the device is gone, and its sessions have ended.
    pub fn life(&self) -> watch::Sender<()> {
        self.life.clone()
    }

    /// Tells the kernel its new size, in bytes.
    pub async fn resize(&self, size: u64) -> Result<()> {
        let (index, setup) = (self.index, self.setup.clone());
        command(move |client| client.resize(index, &setup, size)).await
    }

    /// Removes it; unless forced, only if nobody is seen to use it.
    pub async fn stop(&self, forced: bool) -> Result<()> {
        let index = self.index;
        if !forced {
            let looked = spawn_blocking(move || {
                device::users(Path::new(device::SYSFS), Path::new(device::PROCFS), index)
            });
            if let [first, ..] = &looked.await.map_err(|_| stopped())??[..] {
                let path = self.path();
                let what =
                    format!("{path} is open: it is {first}; close it, or detach with --force");
                return Err(Error::new(Kind::InUse, what));
            }
        }
        // No connection is made while the kernel takes leave of the old ones.
        self.orders.send_replace(Orders::Wait);
        if forced {
            // The kernel may be waiting to send by one of them, with a lock that it then asks for,
            // and one that all of the machine's generic netlink waits for.
            locked(&self.lines).iter().for_each(Line::cut);
        }
        match command(move |client| client.disconnect(index)).await {
            Ok(()) => self.orders.send_replace(Orders::End),
            Err(error) => {
                self.orders.send_replace(Orders::Keep);
                return Err(error);
            }
        };
        timeout(END, self.life.closed()).await.map_err(|_| {
            let what = format!("{}: its requests don't end; a disk hangs", self.path());
            Error::new(Kind::Unavailable, what)
        })
    }
}

impl Service {
    /// So many connections: their clients' ends, and their sessions. They are added to `lines`.
    fn connect(&self, count: usize, lines: &Lines) -> Result<(Links, JoinSet<()>)> {
        let mut links = Links { sockets: Vec::new(), size: 0, flags: 0 };
        let mut sessions = JoinSet::new();
        for _ in 0..count {
            let pair = self.server.pair(self.export.clone())?;
            let Pair { socket, terms, session, line } = pair;
            let mut lines = locked(lines);
            lines.retain(Line::is_open);
            lines.push(line);
            links.sockets.push(socket);
            (links.size, links.flags) = (self.export.device.info().size, terms.flags);
            // A session that panicked has ended too.
            sessions.spawn(async move { drop(session.await) });
        }
        Ok((links, sessions))
    }
}

/// Keeps a device connected for as long as it is attached.
struct Keeper {
    service: Service,
    index: u32,
    setup: Setup,
    lines: Lines,
    orders: watch::Receiver<Orders>,
    _alive: watch::Receiver<()>,
}

impl Keeper {
    async fn keep(mut self, mut sessions: JoinSet<()>) {
        let mut pause = PAUSE;
        let mut connected = Instant::now();
        while sessions.join_next().await.is_some() {
            if connected.elapsed() > LONG_PAUSE {
                pause = PAUSE;
            }
            loop {
                sleep(pause).await;
                pause = (pause * 2).min(LONG_PAUSE);
                // Without anybody who gives orders the last ones stand.
                let _ = self.orders.wait_for(|orders| *orders != Orders::Wait).await;
                if *self.orders.borrow() == Orders::End {
                    while sessions.join_next().await.is_some() {}
                    return;
                }
                match self.reconnect().await {
                    Ok(session) => {
                        sessions.spawn(session);
                        break;
                    }
                    Err(error) if error.kind() == Kind::NotFound => {
                        // Detached by somebody else. The kernel lets go of all of its connections.
                        while sessions.join_next().await.is_some() {}
                        return;
                    }
                    Err(error) => {
                        let device = node(self.index);
                        tracing::warn!(device = %device.display(), %error, "not reconnected yet");
                    }
                }
            }
            connected = Instant::now();
        }
    }

    /// One more connection; what ends with its session.
    async fn reconnect(&self) -> Result<impl Future<Output = ()> + use<>> {
        let (links, mut sessions) = self.service.connect(1, &self.lines)?;
        let (index, what) = (self.index, self.setup.clone());
        command(move |client| client.reconnect(index, &what, links)).await?;
        Ok(async move { while sessions.join_next().await.is_some() {} })
    }
}

/// Gives the kernel's client a command. One that takes too long goes on by itself.
async fn command<T: Send + 'static>(
    give: impl FnOnce(&mut Client) -> Result<T> + Send + 'static,
) -> Result<T> {
    let given = spawn_blocking(move || give(&mut Client::open()?));
    let late = || {
        let what = "the kernel's NBD client does not come to an end; does a disk hang?";
        Error::new(Kind::Unavailable, what)
    };
    timeout(COMMAND, given).await.map_err(|_| late())?.map_err(|_| stopped())?
}

fn locked(lines: &Lines) -> MutexGuard<'_, Vec<Line>> {
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}

fn stopped() -> Error {
    Error::new(Kind::Unavailable, "the daemon is stopping")
}
