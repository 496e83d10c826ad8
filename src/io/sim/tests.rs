//! Invariants checked: what a sync covers survives, what it doesn't may not; the seed decides all.

use super::*;

fn tagged(tag: u8, sectors: usize) -> Buf {
    let buf = Buf::heap(sectors * 512);
    buf.fill(tag);
    buf
}

#[test]
fn a_sync_covers_what_completed_before_it() {
    let sim = Sim::new(1);
    let file = sim.create(512, &[], 4096);
    let io = sim.clone();
    let run = sim.run_one(
        async move {
            io.write(&file, tagged(1, 2), 0).await?;
            io.sync(&file).await?;
            io.write(&file, tagged(2, 2), 512).await
        },
        None,
    );
    assert!(run.is_some_and(|done| done.is_ok()));
    let now = sim.peek(file);
    assert_eq!((now[0], now[512], now[1024], now[1536]), (1, 2, 2, 0));
    sim.power_cut(Cut::LoseAll);
    let left = sim.peek(file);
    assert_eq!((left[0], left[512], left[1024]), (1, 1, 0));
}

#[test]
fn sectors_are_lost_one_by_one_and_the_seed_decides() {
    let after = |seed| {
        let sim = Sim::new(seed);
        let file = sim.create(1, &[], 64 * 512);
        let io = sim.clone();
        let written = sim.run_one(async move { io.write(&file, tagged(7, 64), 0).await }, None);
        assert!(written.is_some_and(|done| done.is_ok()));
        sim.power_cut(Cut::Any);
        sim.peek(file).chunks(512).map(|sector| sector[0]).collect::<Vec<_>>()
    };
    let mixed = (0..20).filter(|seed| {
        let sectors = after(*seed);
        assert_eq!(sectors, after(*seed));
        assert!(sectors.iter().all(|byte| [0, 7].contains(byte)));
        sectors.contains(&0) && sectors.contains(&7)
    });
    assert!(mixed.count() > 5);
}

#[test]
fn a_failed_sync_is_never_made_good() {
    let mut lost = 0;
    for seed in 0..50 {
        let sim = Sim::new(seed);
        let file = sim.create(1, &[], 512);
        let io = sim.clone();
        sim.run_one(
            async move {
                io.write(&file, tagged(1, 1), 0).await.expect("no faults yet");
                io.set_faults(Faults { sync: 1024, ..Faults::default() });
                assert!(io.sync(&file).await.is_err());
                io.set_faults(Faults::default());
                io.sync(&file).await.expect("no faults any more");
            },
            None,
        )
        .expect("ran to its end");
        sim.power_cut(Cut::LoseAll);
        lost += usize::from(sim.peek(file)[0] == 0);
    }
    assert_eq!(lost, 50);
}

#[test]
fn a_kill_keeps_what_completed_and_a_later_cut_may_not() {
    let sim = Sim::new(3);
    let file = sim.create(1, &[], 1024);
    let io = sim.clone();
    sim.run_one(async move { io.write(&file, tagged(1, 1), 0).await }, None);
    let io = sim.clone();
    let cut = sim.run_one(async move { io.write(&file, tagged(2, 2), 0).await }, Some(0));
    assert!(cut.is_none());
    sim.kill();
    assert!([1, 2].contains(&sim.peek(file)[0]));
    sim.power_cut(Cut::LoseAll);
    assert_eq!(sim.peek(file)[0], 0);
}

#[test]
fn direct_files_refuse_what_is_not_aligned() {
    let sim = Sim::new(4);
    let file = sim.create(512, &[], 4096);
    let io = sim.clone();
    let done = sim.run_one(
        async move {
            let buf = Buf::heap(1024);
            [
                io.write(&file, buf.clone(), 100).await.is_err(),
                io.write(&file, buf.slice(0..100), 0).await.is_err(),
                io.read(&file, buf.slice(4..516), 0).await.is_err(),
                io.read(&file, buf.slice(512..1024), 0).await.is_err(),
            ]
        },
        None,
    );
    assert_eq!(done, Some([true, true, true, false]));
}

#[test]
fn tasks_that_wait_for_each_other_are_stuck() {
    let sim = Sim::new(5);
    assert_eq!(sim.run(vec![Box::pin(std::future::pending())], None), End::Stuck);
    assert_eq!(sim.run(vec![Box::pin(async {})], None), End::Done(0));
}
