//! Threads that share an overlay, on real files.

use std::{path::Path, time::Instant};

use underlay::{
    cow::{Base, Overlay, Provision, format},
    io::Buf,
    units::Block,
};

use crate::{
    BLOCK, ID, Pattern,
    files::{self, Files},
};

/// An image of a TiB without a zero.
struct Solid;

impl Base<Files> for Solid {
    fn size(&self) -> u64 {
        1 << 40
    }

    fn is_zero(&self, _: Block) -> bool {
        false
    }

    fn zero_run(&self, blocks: std::ops::Range<u64>) -> (bool, u64) {
        (false, blocks.end)
    }

    async fn read(&self, _: &Files, _: u64, buf: Buf) -> underlay::Result<()> {
        buf.fill(1);
        Ok(())
    }
}

fn block_on<T>(task: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(task)
}

fn open(dir: &Path) -> Overlay<Files> {
    let (data, map) = (files::open(&dir.join("data")), files::open(&dir.join("map")));
    block_on(Overlay::open(&Files, data, map, ID, None)).expect("it opens")
}

fn create(dir: &Path, size: u64, records: u32) {
    std::fs::write(dir.join("map"), format::blank(ID, size, records)).expect("written");
    files::open(&dir.join("data")).set_len(size).expect("a sparse file");
}

/// Each thread has blocks of its own, side by side with those of the others in every word of the
/// map, and finds in them what it last put there.
#[test]
fn threads_do_not_disturb_each_other() {
    const THREADS: u64 = 4;
    const BLOCKS: u64 = 96;
    let dir = tempfile::tempdir().expect("a directory");
    let size = THREADS * BLOCKS * BLOCK;
    create(dir.path(), size, 2);
    let overlay = open(dir.path());
    let base = Pattern { size: size / 2 };
    let work = |thread: u64| {
        let (overlay, base) = (&overlay, &base);
        move || {
            block_on(async {
                let mut rng = fastrand::Rng::with_seed(thread);
                let mut model: Vec<Vec<u8>> = (0..BLOCKS)
                    .map(|i| (i * THREADS + thread) * BLOCK)
                    .map(|start| (start..start + BLOCK).map(|at| base.byte(at)).collect())
                    .collect();
                for _ in 0..4000 {
                    let index = rng.u64(0..BLOCKS);
                    let offset = (index * THREADS + thread) * BLOCK;
                    let model = &mut model[index as usize];
                    match rng.u8(0..12) {
                        0..=3 => {
                            let start = rng.usize(0..8) * 512;
                            let end = rng.usize(start / 512 + 1..=8) * 512;
                            let bytes = vec![rng.u8(..); end - start];
                            let buf = Buf::from_bytes(&bytes);
                            let at = offset + start as u64;
                            overlay.write(&Files, base, at, buf).await.expect("sound");
                            model[start..end].copy_from_slice(&bytes);
                        }
                        4 => {
                            overlay.discard(&Files, offset, BLOCK).await.expect("sound");
                            let buf = Buf::heap(4096);
                            overlay.read(&Files, base, offset, buf.clone()).await.expect("sound");
                            assert!(buf.to_vec() == *model || buf.to_vec() == [0; 4096]);
                            *model = buf.to_vec();
                        }
                        5 => {
                            let release = Provision::Release;
                            overlay
                                .write_zeroes(&Files, base, offset, BLOCK, release)
                                .await
                                .expect("sound");
                            model.fill(0);
                        }
                        6 => overlay.flush(&Files).await.expect("sound"),
                        _ => {
                            let buf = Buf::heap(4096);
                            overlay.read(&Files, base, offset, buf.clone()).await.expect("sound");
                            assert!(buf.to_vec() == *model, "thread {thread}, block {index}");
                        }
                    }
                }
                overlay.flush(&Files).await.expect("sound");
                model
            })
        }
    };
    let models: Vec<Vec<Vec<u8>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(work(thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    drop(overlay);
    let overlay = open(dir.path());
    for (thread, model) in models.iter().enumerate() {
        for (index, expected) in model.iter().enumerate() {
            let buf = Buf::heap(4096);
            let offset = (index as u64 * THREADS + thread as u64) * BLOCK;
            block_on(overlay.read(&Files, &base, offset, buf.clone())).expect("sound");
            assert!(buf.to_vec() == *expected, "thread {thread}, block {index} after reopening");
        }
    }
}

#[test]
fn opening_costs_little() {
    let dir = tempfile::tempdir().expect("a directory");
    create(dir.path(), 1 << 40, format::RECORDS);
    let began = Instant::now();
    let overlay = open(dir.path());
    let untouched = began.elapsed();
    assert!(overlay.stats().map_bytes < 32 << 10, "{:?}", overlay.stats());

    // 100 GiB of it in use, block by block; then a crash.
    let base = Pattern { size: 0 };
    block_on(async {
        for start in (0..100u64 << 30).step_by(1 << 30) {
            let keep = Provision::Release;
            overlay.write_zeroes(&Files, &Solid, start, 1 << 30, keep).await.expect("sound");
        }
        overlay.flush(&Files).await.expect("sound");
        overlay.write(&Files, &base, 5 * BLOCK, Buf::heap(4096)).await.expect("sound");
        overlay.flush(&Files).await.expect("sound");
    });
    drop(overlay);
    let began = Instant::now();
    let overlay = open(dir.path());
    let used = began.elapsed();
    println!("open: untouched TiB {untouched:?}, 100 GiB in use after a crash {used:?}");
    assert!(overlay.stats().map_bytes > 6 << 20);
    // The marks are 50 ms and 100 ms; a busy machine gets some grace.
    assert!(untouched.as_millis() < 250 && used.as_millis() < 500, "{untouched:?}, {used:?}");
}
