//! A process that other processes' writes go through must not wait for such writes itself.
//!
//! When memory is short the kernel lets whoever allocates write dirty pages out first. If those pages
//! belong to a device that this very process serves, it waits for itself, and the machine
//! stands still. The kernel has a switch for such processes: their allocations start no I/O, and they
//! are not held back when there are many dirty pages.

use std::io::{Error, Result};

/// Names that the kernel's headers have and the crate `libc` has not.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
const PR_GET_IO_FLUSHER: libc::c_int = 58;

/// Turns the switch on, for this thread and all that it starts from now on (the ring's kernel
/// threads among them): to be called before any other thread is started. Needs CAP_SYS_RESOURCE.
pub fn protect() -> Result<()> {
    // SAFETY: this prctl takes numbers only, and changes nothing but a flag of the calling thread.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// Whether the calling thread has it on. Needs CAP_SYS_RESOURCE too.
pub fn is_protected() -> Result<bool> {
    // SAFETY: as above; it only reads the flag.
    match unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) } {
        -1 => Err(Error::last_os_error()),
        set => Ok(set == 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_inherit_the_protection() {
        // On a thread of its own: the flag would stay on the test's.
        let seen = std::thread::spawn(|| {
            protect()?;
            let child = std::thread::spawn(is_protected).join().expect("the child's thread");
            Ok::<_, Error>((is_protected()?, child?))
        });
        match seen.join().expect("the thread") {
            Ok(seen) => assert_eq!(seen, (true, true)),
            // Without the privilege there is nothing to see, and a clear reason.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{error}"),
        }
        assert!(!is_protected().unwrap_or(false), "only the thread that asked for it");
    }
}
