//! `underlay attach` and `detach`: exports as block devices of this host.

use clap::Args;

use super::{
    Outcome, Setting,
    out::{Side, Table},
};
use crate::{
    catalog::Via,
    control::api::{Attach as AttachRequest, AttachmentView, Detach as DetachRequest},
    error::Result,
};

/// Make a block device of an image (read-only) or a replica.
///
/// The device stays when the daemon stops or crashes: its requests wait, and the next daemon serves
/// them. It is made again after a restart of the machine, until it is detached. Links to it are
/// /dev/underlay/image/NAME and /dev/underlay/replica/NAME.
///
/// ublk moves data without a copy where the kernel can (`underlay doctor` tells); a daemon that isn't
/// root makes devices that copy, and end with it. --via nbd uses the kernel's NBD client.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay attach replica/vm1\n  \
    mount /dev/underlay/replica/vm1 /mnt\n  \
    underlay attach image/debian-12 --scan\n  \
    underlay attach replica/vm2 --via nbd")]
pub struct Attach {
    /// image/NAME or replica/NAME.
    export: String,
    /// What makes the block device.
    #[arg(long, default_value = "ublk")]
    via: Via,
    /// Queues, each served by one I/O thread: 1 or 2 otherwise. With --via nbd, connections: 1, of an
    /// image more if asked for.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: Option<u16>,
    /// Requests that a queue may have under way: 64 otherwise. Not with --via nbd: always 128.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    depth: Option<u16>,
    /// Copy data between kernel and daemon, also where that isn't needed.
    #[arg(long)]
    copy: bool,
    /// Have the kernel look for partitions on it.
    #[arg(long)]
    scan: bool,
}

/// Remove the block device of an image or replica. Refused while it is open.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    underlay detach replica/vm1\n  \
    underlay detach /dev/ublkb0 --force")]
pub struct Detach {
    /// image/NAME, replica/NAME, or the device's path.
    what: String,
    /// Also while it is open: its users get errors and lose what they have not flushed.
    #[arg(long)]
    force: bool,
}

impl Attach {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let request = AttachRequest {
            export: self.export,
            via: Some(self.via),
            queues: self.queues,
            depth: self.depth,
            copy: self.copy,
            scan: self.scan,
        };
        let attached: AttachmentView = setting.client()?.post("/v1/attachments", &request).await?;
        setting.show(&attached, |it| format!("{}\n", it.device.display()))?;
        Ok(Outcome::Well)
    }
}

impl Detach {
    pub(super) async fn run(self, setting: &Setting) -> Result<Outcome> {
        let request = DetachRequest { what: self.what, force: self.force };
        let detached: AttachmentView =
            setting.client()?.post("/v1/attachments/detach", &request).await?;
        setting.show(&detached, |it| format!("{} is detached\n", it.device.display()))?;
        Ok(Outcome::Well)
    }
}

/// The attachments as a table; nothing if there are none.
pub fn table(attachments: &[AttachmentView]) -> String {
    if attachments.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&[
        ("ATTACHED", Side::Left),
        ("DEVICE", Side::Left),
        ("VIA", Side::Left),
        ("QUEUES", Side::Right),
        ("DEPTH", Side::Right),
        ("STATE", Side::Left),
    ]);
    for it in attachments {
        table.row([
            it.export.clone(),
            it.device.display().to_string(),
            match it.via {
                Via::Ublk => "ublk".to_owned(),
                Via::Nbd => "nbd".to_owned(),
            },
            it.queues.to_string(),
            it.depth.to_string(),
            match (&it.waiting, it.zero_copy) {
                (Some(reason), _) => format!("waits: {reason}"),
                (None, Some(true)) => "served, zero copy".to_owned(),
                (None, _) => "served, copying".to_owned(),
            },
        ]);
    }
    table.text("")
}
