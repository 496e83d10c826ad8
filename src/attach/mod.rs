//! Attachments: exports of this node as block devices of its kernel.
//!
//! `nbd` hands connections to our own NBD server to the kernel's NBD client, by way of `netlink`.
//!
//! Invariant: a thread of the daemon never waits for I/O on a device that the daemon serves. It
//! would wait for itself; and because descriptors are closed only when a process's last thread has
//! ended, not even SIGKILL would then close the device's connections. So nothing here opens a
//! device node: what is to be known of a device comes from sysfs and procfs.

pub mod nbd;
pub mod netlink;
