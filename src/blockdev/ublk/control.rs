//! The driver's control device: adding, starting, stopping, recovering block devices.
//!
//! Every call waits in the kernel, some for as long as a device has users.

use std::{
    fs::{File, OpenOptions},
    io,
};

use super::abi::{self, DeviceInfo, control, flag};
use crate::{
    blockdev::Info,
    error::{Error, Kind, Result},
    io::command::{Commands, Operand},
};

/// The control device.
const PATH: &str = "/dev/ublk-control";

/// An open control device.
pub(super) struct Control {
    commands: Commands,
    file: File,
    /// Whether the devices that it speaks of were made without privileges: they are told by their
    /// path, whose permissions then count.
    pub(super) unprivileged: bool,
}

impl Control {
    /// Opens it.
    pub(super) fn open() -> Result<Control> {
        let open = OpenOptions::new().read(true).write(true).open(PATH);
        let file = open.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::caused(
                Kind::Unsupported,
                "no ublk driver: load it (modprobe ublk_drv), or attach with --via nbd",
                error,
            ),
            io::ErrorKind::PermissionDenied => Error::caused(
                Kind::Permission,
                format!(
                    "{PATH} is closed to this user: run the daemon as root, or see \
                    packaging/61-underlay-unprivileged.rules"
                ),
                error,
            ),
            _ => Error::io(format!("opening {PATH}"), error),
        })?;
        let commands = Commands::new()
            .map_err(|error| Error::io("making a ring for the ublk driver's commands", error))?;
        Ok(Control { commands, file, unprivileged: false })
    }

    /// What the driver can do.
    pub(super) fn features(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        let operand = Some(&mut bytes[..]);
        self.send(control::GET_FEATURES, u32::MAX, 0, operand, "asking for features").map_err(
            |error| {
                let what = "the ublk driver is too old (Linux 6.5 or later is needed)";
                Error::caused(Kind::Unsupported, what, error)
            },
        )?;
        Ok(abi::number_of(bytes))
    }

    /// Adds a device; what it became.
    pub(super) fn add(&mut self, info: DeviceInfo) -> Result<DeviceInfo> {
        let mut bytes = info.encode();
        self.send(control::ADD_DEV, info.id, 0, Some(&mut bytes), "adding it")?;
        Ok(DeviceInfo::decode(&bytes))
    }

    /// The device of this number. Later commands are given as to a device of its kind.
    pub(super) fn info(&mut self, id: u32) -> Result<DeviceInfo> {
        let mut bytes = [0; DeviceInfo::BYTES];
        let looking = "looking at it";
        self.unprivileged = false;
        let told = self.send(control::GET_DEV_INFO, id, 0, Some(&mut bytes), looking);
        if let Err(error) = told {
            if error.kind() == Kind::NotFound {
                return Err(error);
            }
            // It was made without privileges, or this process has none: it is told by its path.
            self.unprivileged = true;
            self.send(control::GET_DEV_INFO2, id, 0, Some(&mut bytes), looking)?;
        }
        let info = DeviceInfo::decode(&bytes);
        self.unprivileged = info.flags & flag::UNPRIVILEGED_DEV != 0;
        Ok(info)
    }

    /// Tells what the device is like, before it starts.
    pub(super) fn set_params(&mut self, id: u32, info: Info, max_io: u32) -> Result<()> {
        let mut bytes = abi::params(info, max_io);
        self.send(control::SET_PARAMS, id, 0, Some(&mut bytes), "setting its parameters")
    }

    /// Makes the block device, once all of its queues wait for requests.
    pub(super) fn start(&mut self, id: u32) -> Result<()> {
        self.send(control::START_DEV, id, u64::from(std::process::id()), None, "starting it")
    }

    /// Begins to take over a device whose server has gone.
    pub(super) fn start_recovery(&mut self, id: u32) -> Result<()> {
        self.send(control::START_USER_RECOVERY, id, 0, None, "taking it over")
    }

    /// Ends the taking over, once all queues wait for requests.
    pub(super) fn end_recovery(&mut self, id: u32) -> Result<()> {
        let process = u64::from(std::process::id());
        self.send(control::END_USER_RECOVERY, id, process, None, "taking it over")
    }

    /// Takes the requests that wait away from this server; those under way are finished first, for
    /// at most `milliseconds`. The block device stays, and waits for the next server.
    pub(super) fn quiesce(&mut self, id: u32, milliseconds: u64) -> Result<()> {
        self.send(control::QUIESCE_DEV, id, milliseconds, None, "handing it over")
    }

    /// Removes the block device. Its users get errors; with `careful`, it refuses while there are any.
    pub(super) fn stop(&mut self, id: u32, stop: Stop) -> Result<()> {
        let number = match stop {
            Stop::Unused => control::TRY_STOP_DEV,
            Stop::Forced => control::STOP_DEV,
        };
        self.send(number, id, 0, None, "stopping it")
    }

    /// Removes what is left of the device, once its queues are gone. Its number is free again when
    /// nobody has it open any more; that is waited for if it was unused.
    pub(super) fn delete(&mut self, id: u32, stop: Stop) -> Result<()> {
        let unprivileged = self.unprivileged;
        let mut give = |number| self.send(number, id, 0, None, "removing it");
        match stop {
            Stop::Unused => give(control::DEL_DEV),
            // The driver does not know the other command from such users.
            Stop::Forced if unprivileged => give(control::DEL_DEV),
            Stop::Forced => match give(control::DEL_DEV_ASYNC) {
                // Before Linux 6.9.
                Err(error) if error.kind() == Kind::Unsupported => give(control::DEL_DEV),
                given => given,
            },
        }
    }

    /// Tells a new size, in bytes.
    pub(super) fn resize(&mut self, id: u32, size: u64) -> Result<()> {
        self.send(control::UPDATE_SIZE, id, size / crate::units::SECTOR, None, "growing it")
    }

    fn send(
        &mut self,
        number: u32,
        id: u32,
        value: u64,
        operand: Option<&mut [u8]>,
        what: &str,
    ) -> Result<()> {
        // Adding is allowed by the control device's permissions; all else by the device's own.
        let named =
            self.unprivileged && !matches!(number, control::ADD_DEV | control::GET_FEATURES);
        let mut path = if named { format!("/dev/ublkc{id}\0").into_bytes() } else { Vec::new() };
        let path_len = path.len();
        path.extend_from_slice(operand.as_deref().unwrap_or_default());
        let command = abi::control_command(id, value, path_len as u16);
        let (length_at, address_at) = abi::OPERAND;
        let bytes = &mut path[..];
        let about = (!bytes.is_empty()).then_some(Operand { bytes, length_at, address_at });
        let sent = self.commands.run(&self.file, number, command, about);
        if let Some(operand) = operand {
            operand.copy_from_slice(&path[path_len..]);
        }
        let name = if id == u32::MAX { "ublk".to_owned() } else { format!("/dev/ublkb{id}") };
        sent.map(|_| ()).map_err(|error| {
            let context = format!("{name}: {what}");
            match error.raw_os_error() {
                Some(libc::EBUSY) => Error::caused(Kind::InUse, context, error),
                Some(libc::ENODEV) => Error::caused(Kind::NotFound, context, error),
                Some(libc::EEXIST) => Error::caused(Kind::Exists, context, error),
                _ => Error::io(context, error),
            }
        })
    }
}

/// When a device may be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// When nobody has it open.
    Unused,
    /// Now: its users get errors, and lose what was not flushed.
    Forced,
}

/// The flags that a device gets from a driver that can `features`.
///
/// # Errors
/// `Unsupported` if that is too little.
pub(super) fn flags(features: u64, zero_copy: bool, unprivileged: bool, scan: bool) -> Result<u64> {
    if features & flag::CMD_IOCTL_ENCODE == 0 {
        let what = "the ublk driver is too old (Linux 6.5 or later is needed)";
        return Err(Error::new(Kind::Unsupported, what));
    }
    let mut flags = flag::CMD_IOCTL_ENCODE;
    let some = |wanted: u64| if features & wanted == wanted { wanted } else { 0 };
    flags |= some(flag::UPDATE_SIZE);
    if !scan {
        flags |= some(flag::NO_AUTO_PART_SCAN);
    }
    if unprivileged {
        // Such a device can be neither taken over nor served without copying.
        return Ok(flags | flag::UNPRIVILEGED_DEV);
    }
    flags |= some(flag::USER_RECOVERY | flag::USER_RECOVERY_REISSUE);
    flags |= some(flag::QUIESCE);
    flags |= some(flag::SAFE_STOP_DEV);
    if zero_copy {
        flags |= some(flag::ZERO_COPY);
    }
    Ok(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_what_the_driver_can() {
        assert_eq!(
            flags(0, true, false, false).unwrap_err().kind(),
            Kind::Unsupported,
            "before Linux 6.4"
        );
        let old = flag::CMD_IOCTL_ENCODE | flag::USER_RECOVERY | flag::USER_RECOVERY_REISSUE;
        assert_eq!(flags(old, true, false, false).unwrap(), old);
        let some = old | flag::SUPPORT_ZERO_COPY | flag::AUTO_BUF_REG;
        assert_eq!(flags(some, true, false, false).unwrap(), old, "zero copy in part is none");
        let all = flags(u64::MAX, true, false, false).unwrap();
        assert_eq!(all & flag::ZERO_COPY, flag::ZERO_COPY);
        assert_eq!(all & flag::UNPRIVILEGED_DEV, 0);
        assert_eq!(flags(u64::MAX, false, false, true).unwrap() & flag::ZERO_COPY, 0);
        let user = flags(u64::MAX, true, true, false).unwrap();
        assert_eq!(user & (flag::ZERO_COPY | flag::USER_RECOVERY), 0);
    }
}
