//! The programs that `cargo xtask build-ebpf` builds; one file a tracepoint.
//!
//! Invariants:
//! - What is not watched costs one look-up and nothing else.
//! - Who submitted an I/O is known at `block_bio_queue` alone: completion runs in whatever context the
//!   interrupt hit. An entry of [`Bios`](underlay_agent_ebpf::Bios) carries it to the request.
//! - A bio or request is known by its address, from its beginning to its end.
//! - An I/O that can't be followed is left out, or counted in
//!   [`Losses`](underlay_agent_ebpf::Losses); it never counts twice.
#![cfg_attr(
    target_arch = "bpf",
    no_std,
    no_main,
    feature(asm_experimental_arch, core_intrinsics),
    allow(internal_features)
)]

#[cfg(target_arch = "bpf")]
mod bio_complete;
#[cfg(target_arch = "bpf")]
mod bio_queue;
#[cfg(target_arch = "bpf")]
mod bio_split;
#[cfg(target_arch = "bpf")]
mod finish;
#[cfg(target_arch = "bpf")]
mod kernel;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod rq_complete;
#[cfg(target_arch = "bpf")]
mod rq_issue;
#[cfg(target_arch = "bpf")]
mod rq_requeue;
#[cfg(target_arch = "bpf")]
mod table;

/// The kernel's structures are open to programs under the GPL's terms alone. The kernel knows
/// the compatible pair of licences by this name.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // No program has a path to here that the verifier would let pass.
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("eBPF programs run in the kernel: cargo xtask build-ebpf builds them");
}
