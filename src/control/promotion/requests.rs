//! What the API asks of promotion.

use underlay_agent::report::{Report, Watch};

use super::*;
use crate::{
    catalog::{Pin, Profile},
    control::{api::*, metrics},
    error::Kind,
    promote::{demand::Total, mover::PATIENCE, signal},
    units::{self, CHUNK},
};

/// Cells that a heat map has at most.
const CELLS: u64 = 2048;
/// Chunks that are told as the hottest.
const HOTTEST: usize = 20;
/// The longest recording, in seconds.
const RECORDING_MAX: u64 = 24 * 3600;
/// How long until a disk's policy is told again what is pinned, where not all could be.
const PINS_AGAIN: Duration = Duration::from_secs(15);

impl Promotion {
    /// Every disk's cache.
    pub fn caches(&self) -> Vec<CacheView> {
        let pins = self.pins();
        let seats = self.bench.views.all();
        let state = self.state();
        state.plans.iter().map(|(disk, plan)| self.cache_view(disk, plan, &seats, &pins)).collect()
    }

    fn cache_view(
        &self,
        disk: &Name,
        plan: &Plan,
        seats: &[Arc<Seat>],
        pins: &[(Name, Pin)],
    ) -> CacheView {
        let mut images: Vec<CachedImage> = seats
            .iter()
            .filter(|seat| seat.disk == *disk)
            .map(|seat| {
                let cache = seat.view.cache();
                let chunks = cache.map_or(0, |cache| cache.stored());
                let pin = pins.iter().find(|(at, pin)| at == disk && pin.digest == seat.digest);
                let count = |of: fn(Total) -> u64| seat.view.demand.totals().map(of).sum();
                CachedImage {
                    image: self.name_of(seat.digest),
                    digest: seat.digest.to_string(),
                    copy: seat.copy_disk().map(String::from),
                    chunks,
                    bytes: chunks * CHUNK,
                    pinned: pin.map(|(_, pin)| extent(pin.whole)),
                    copy_reads: count(|total| total.copy),
                    cache_reads: count(|total| total.cache),
                }
            })
            .collect();
        images.sort_by(|a, b| a.image.cmp(&b.image));
        CacheView {
            disk: disk.clone(),
            limit_bytes: plan.limit,
            stored_bytes: images.iter().map(|image| image.bytes).sum(),
            off: plan.off.clone(),
            images,
            figures: plan.figures(),
        }
    }

    /// Empties caches. What is pinned is promoted anew.
    pub fn clear(&self, disk: Option<&Name>, image: Option<Digest>) -> Cleared {
        let mut chunks = 0;
        let wanted = |seat: &&Arc<Seat>| {
            disk.is_none_or(|disk| seat.disk == *disk) && image.is_none_or(|it| seat.digest == it)
        };
        let seats = self.bench.views.all();
        // The movers sweep what is withdrawn.
        for cache in seats.iter().filter(wanted).filter_map(|seat| seat.view.cache()) {
            let present = cache.present();
            chunks += present.len() as u64;
            present.iter().for_each(|chunk| cache.withdraw(*chunk));
        }
        Cleared { chunks }
    }

    /// Keeps an image, or what its profile names, in the cache of a disk.
    pub async fn pin(&self, disk: Name, digest: Digest, extent: Extent) -> Result<Warming> {
        let keys = self.keys(&disk, digest, extent).await?;
        let id = self.planned(&disk).await?;
        plan_of(&mut self.state(), &disk)?.policy.pinnable(&keys)?;
        let pin = Pin { disk: id, digest, whole: extent == Extent::Whole };
        self.change_pins(move |pins| {
            pins.retain(|other| (other.disk, other.digest) != (id, digest));
            pins.push(pin);
        })
        .await?;
        let warming = self.warming(keys.len());
        let mut state = self.state();
        let plan = plan_of(&mut state, &disk)?;
        if warming.bytes > plan.limit {
            tracing::warn!(%disk, image = %digest, "more is pinned than the cache may hold");
        }
        plan.policy.pin(&keys)?;
        Ok(warming)
    }

    /// Keeps an image no longer.
    pub async fn unpin(&self, disk: Name, digest: Digest) -> Result<()> {
        let id = self.planned(&disk).await?;
        self.change_pins(move |pins| {
            pins.retain(|other| (other.disk, other.digest) != (id, digest));
        })
        .await?;
        let mut state = self.state();
        let State { plans, images, .. } = &mut *state;
        if let Some(plan) = plans.get_mut(&disk)
            && let Some(image) = images.find(digest)
        {
            let chunks = images.of(image).map_or(0, |(_, size)| units::chunks(size));
            let keys: Vec<Key> =
                (0..chunks).map(|chunk| Key { image, chunk: Chunk(chunk) }).collect();
            plan.policy.unpin(&keys);
        }
        Ok(())
    }

    /// Brings an image, or what its profile names, to the cache of a disk, as far as there is room.
    pub async fn warm(&self, disk: Name, digest: Digest, extent: Extent) -> Result<Warming> {
        let keys = self.keys(&disk, digest, extent).await?;
        let warming = self.warming(keys.len());
        self.planned(&disk).await?;
        plan_of(&mut self.state(), &disk)?.policy.warm(&keys)?;
        Ok(warming)
    }

    fn warming(&self, chunks: usize) -> Warming {
        let chunks = chunks as u64;
        Warming { chunks, bytes: chunks * CHUNK, rate: self.bench.rate }
    }

    /// Tells the policy of a disk, which is new, what is pinned. What can't be told now, because a copy is
    /// away or its disk hangs, is told when it can.
    pub(super) async fn pin_again(&self, disk: Name) {
        let (mut all, mut failed) = (Vec::new(), false);
        for (_, pin) in self.pins().into_iter().filter(|(at, _)| *at == disk) {
            let keys = self.keys(&disk, pin.digest, extent(pin.whole));
            let keys = tokio::time::timeout(PATIENCE, keys)
                .await
                .unwrap_or_else(|_| Err(Error::new(Kind::Unavailable, "its copy doesn't answer")));
            match keys {
                Ok(keys) => all.push((pin, keys)),
                Err(error) => {
                    tracing::info!(%disk, image = %pin.digest, %error, "what is pinned is not there");
                    failed = true;
                }
            }
        }
        let mut state = self.state();
        let Some(plan) = state.plans.get_mut(&disk) else { return };
        let pins = self.bench.pins.all();
        // Not what was let go meanwhile.
        for (pin, keys) in all.into_iter().filter(|(pin, _)| pins.contains(pin)) {
            if let Err(error) = plan.policy.pin(&keys) {
                tracing::warn!(%disk, image = %pin.digest, %error, "it is not pinned");
            }
        }
        plan.pins = match failed {
            true => PinsTold::Not(Instant::now() + PINS_AGAIN),
            false => PinsTold::All,
        };
    }

    /// The chunks of an image that are meant.
    async fn keys(&self, disk: &Name, digest: Digest, extent: Extent) -> Result<Vec<Key>> {
        let node = self.bench.node.clone();
        let (size, profile) = blocking(move || {
            let image = node.image(&digest.to_string().parse()?)?;
            Ok((image.size, node.profile(digest)?))
        })
        .await?;
        let copy = self.bench.exports.base(digest).await?;
        let copies = copy.sources().copies();
        if copies.iter().any(|copy| copy.disk().name() == disk.as_str()) {
            let what = format!("disk {disk}: image {digest} has its copy there already");
            return Err(Error::new(Kind::Invalid, what));
        }
        let chunks: Vec<u64> = match (extent, profile) {
            (Extent::Whole, _) => (0..units::chunks(size)).collect(),
            (Extent::Profile, Some(profile)) => profile.chunks(units::chunks(size)).collect(),
            (Extent::Profile, None) => {
                let what = format!(
                    "image {digest}: it has no profile; record one while a replica of it runs: \
                     underlay profile record, or take all of it: --all"
                );
                return Err(Error::new(Kind::NotFound, what));
            }
        };
        let image = self.state().images.handle(digest, size);
        let zero = |chunk: &Chunk| copy.is_zero_chunk(*chunk);
        let keys = chunks.into_iter().map(Chunk).filter(|chunk| !zero(chunk));
        Ok(keys.map(|chunk| Key { image, chunk }).collect())
    }

    /// Sees to it that a disk which was added a moment ago has its plan; the disk's identity.
    async fn planned(&self, disk: &Name) -> Result<Uuid> {
        let known = self.bench.node.known_disks().into_iter().find(|known| known.name == *disk);
        let missing = || Error::new(Kind::NotFound, format!("no disk {disk} on this node"));
        let id = known.ok_or_else(missing)?.id;
        let is_planned = |state: &State| state.plans.get(disk).is_some_and(|plan| plan.id == id);
        if !is_planned(&self.state()) {
            self.ask().await;
            let mut state = self.state();
            self.look(&mut state);
            self.plan(&mut state)?;
        }
        Ok(id)
    }

    /// What is pinned, by the names of disks that are known.
    fn pins(&self) -> Vec<(Name, Pin)> {
        let disks = self.state().disks.clone();
        let named = |pin: Pin| Some((disks.iter().find(|it| it.id == pin.disk)?.name.clone(), pin));
        self.bench.pins.all().into_iter().filter_map(named).collect()
    }

    async fn change_pins(&self, change: impl FnOnce(&mut Vec<Pin>) + Send + 'static) -> Result<()> {
        let bench = self.bench.clone();
        blocking(move || bench.pins.change(&bench.node, change)).await
    }

    /// Every profile.
    pub async fn profiles(&self) -> Result<Vec<ProfileView>> {
        let node = self.bench.node.clone();
        blocking(move || {
            let mut profiles = Vec::new();
            for digest in node.profiles()? {
                if let Some(profile) = node.profile(digest)? {
                    profiles.push(profile_view(&node, &profile));
                }
            }
            Ok(profiles)
        })
        .await
    }

    /// An image's profile, whole.
    pub async fn profile(&self, digest: Digest) -> Result<Profile> {
        let node = self.bench.node.clone();
        let missing =
            move || Error::new(Kind::NotFound, format!("image {digest}: it has no profile"));
        blocking(move || node.profile(digest)?.ok_or_else(missing)).await
    }

    /// Forgets an image's profile.
    pub async fn remove_profile(&self, digest: Digest) -> Result<bool> {
        let node = self.bench.node.clone();
        blocking(move || node.remove_profile(digest)).await
    }

    /// Begins to record what is read of an image. False if somebody does already.
    pub fn begin_recording(&self, digest: Digest) -> bool {
        let mut state = self.state();
        let vacant = !state.recordings.contains_key(&digest);
        state.recordings.entry(digest).or_default();
        vacant
    }

    /// How many chunks were read since a recording began.
    pub fn recorded(&self, digest: Digest) -> usize {
        self.state().recordings.get(&digest).map_or(0, |recording| recording.chunks.len())
    }

    /// Ends a recording, and keeps what was read as the image's profile. Blocks.
    pub fn end_recording(&self, digest: Digest) -> Result<ProfileView> {
        // What was read since the last tick belongs to it.
        let taken = self.tick();
        let recording = self.state().recordings.remove(&digest).unwrap_or_default();
        taken?;
        if recording.chunks.is_empty() {
            let what = format!(
                "image {digest}: no replica read anything of it; its profile stays as it was"
            );
            return Err(Error::new(Kind::NotFound, what));
        }
        let profile = Profile::of(digest, &recording.chunks);
        self.bench.node.record_profile(&profile)?;
        Ok(profile_view(&self.bench.node, &profile))
    }

    /// Gives a recording up, if it goes on.
    pub fn drop_recording(&self, digest: Digest) {
        self.state().recordings.remove(&digest);
    }

    /// Forgets an image that is gone: what was promoted of it goes too, from each disk as soon as that
    /// answers. A cache on a disk that is away goes when it is back.
    pub async fn forget(&self, digest: Digest) {
        let removals: Vec<_> = {
            let mut state = self.state();
            let State { plans, images, .. } = &mut *state;
            if let Some(image) = images.find(digest) {
                plans.values_mut().for_each(|plan| plan.policy.forget_image(image));
            }
            self.bench.views.forget(|seat| seat.digest == digest);
            plans.values().map(|plan| plan.mover.remove(digest)).collect()
        };
        let bench = self.bench.clone();
        let removed = blocking(move || {
            let unpinned =
                bench.pins.change(&bench.node, |pins| pins.retain(|pin| pin.digest != digest));
            bench.node.remove_profile(digest).and(unpinned)
        });
        if let Err(error) = removed.await {
            tracing::warn!(image = %digest, %error, "its pins or its profile could not be removed");
        }
        let removals = futures_util::future::join_all(removals);
        if tokio::time::timeout(LEAVING, removals).await.is_err() {
            tracing::info!(image = %digest, "its caches are being removed still");
        }
    }

    /// What the agent is to watch, unless it knows: it has that of `generation`.
    pub fn watch(&self, generation: Option<u64>) -> Option<Watch> {
        let watched = self.state().watched.clone();
        let known = Some(watched.watch.generation) == generation;
        (!known && watched.watch.generation > 0).then(|| watched.watch.clone())
    }

    /// No agent runs, because of `reason`.
    pub fn no_agent(&self, reason: String) {
        self.state().probes.missing(reason);
    }

    /// Takes in what the agent saw.
    pub fn report(&self, report: &Report) {
        let mut state = self.state();
        let State { probes, signals, watched, .. } = &mut *state;
        if report.generation == watched.watch.generation {
            probes.take(report, signals, watched);
        }
    }

    /// Where latencies are from.
    pub fn signal(&self) -> SignalView {
        self.state().probes.view()
    }

    /// What was promoted, for the metrics.
    pub fn metrics(&self) -> metrics::Promotion {
        let state = self.state();
        let disk = |(disk, plan): (&Name, &Plan)| {
            let figures = plan.figures();
            metrics::PromotingDisk {
                disk: disk.to_string(),
                limit_bytes: plan.limit,
                promoted: figures.promoted,
                promoted_bytes: figures.promoted_bytes,
                evicted: figures.evicted,
                failed: figures.failed,
                saved_seconds: figures.saved_seconds,
            }
        };
        let disks = state.plans.iter().map(disk).collect();
        metrics::Promotion { rate_bytes: self.bench.rate, disks }
    }

    /// What the probes saw, for the metrics.
    pub fn probe_metrics(&self) -> metrics::Probes {
        self.state().probes.metrics()
    }

    /// What happens right now.
    pub fn activity(&self) -> Activity {
        let caches = self.caches();
        let mut hottest: Vec<HotChunk> = Vec::new();
        for seat in self.bench.views.all() {
            if seat.copy_disk().is_some_and(|disk| disk == seat.disk) {
                continue;
            }
            let image = self.name_of(seat.digest);
            let mut totals: Vec<Total> = seat.view.demand.totals().collect();
            totals.sort_by_key(|total| std::cmp::Reverse(total.copy + total.cache));
            totals.truncate(HOTTEST);
            let cached =
                |chunk| seat.view.cache().is_some_and(|cache| cache.lease(chunk).is_some());
            hottest.extend(totals.into_iter().map(|total| HotChunk {
                image: image.clone(),
                disk: seat.disk.clone(),
                chunk: total.chunk.0,
                copy_reads: total.copy,
                cache_reads: total.cache,
                cached: cached(total.chunk),
            }));
        }
        hottest.sort_by_key(|chunk| std::cmp::Reverse(chunk.copy_reads + chunk.cache_reads));
        hottest.truncate(HOTTEST);
        let state = self.state();
        Activity { signal: state.probes.view(), disks: disks(&state), caches, hottest }
    }

    /// Which parts of an image are read from where.
    pub fn heat(&self, digest: Digest, size: u64) -> Heat {
        let per_cell = units::chunks(size).div_ceil(CELLS).max(1);
        let cells = units::chunks(size).div_ceil(per_cell) as usize;
        let seats = self.bench.views.all();
        let mut disks: Vec<DiskHeat> = seats
            .iter()
            .filter(|seat| seat.digest == digest)
            .map(|seat| {
                let mut heat = DiskHeat {
                    disk: seat.disk.clone(),
                    copy: seat.copy_disk().map(String::from),
                    copy_reads: vec![0; cells],
                    cache_reads: vec![0; cells],
                    cached_percent: vec![0; cells],
                };
                let cell = |chunk: Chunk| (chunk.0 / per_cell) as usize;
                for total in seat.view.demand.totals() {
                    heat.copy_reads[cell(total.chunk)] += total.copy;
                    heat.cache_reads[cell(total.chunk)] += total.cache;
                }
                let mut cached = vec![0_u64; cells];
                let present = seat.view.cache().map(|cache| cache.present()).unwrap_or_default();
                present.into_iter().for_each(|chunk| cached[cell(chunk)] += 1);
                for (percent, count) in heat.cached_percent.iter_mut().zip(cached) {
                    *percent = (count * 100 / per_cell).min(100) as u8;
                }
                heat
            })
            .collect();
        disks.sort_by(|a, b| a.disk.cmp(&b.disk));
        Heat { image: self.name_of(digest), size, cell_bytes: per_cell * CHUNK, disks }
    }

    /// A name of an image, or its digest.
    fn name_of(&self, digest: Digest) -> String {
        name_of(&self.bench.node, digest)
    }
}

/// The length of a recording that was asked for, or why it can't be.
pub fn recording_length(seconds: u64) -> Result<Duration> {
    if !(1..=RECORDING_MAX).contains(&seconds) {
        let what = format!("a recording of {seconds} s: 1 to {RECORDING_MAX} are possible");
        return Err(Error::new(Kind::Invalid, what));
    }
    Ok(Duration::from_secs(seconds))
}

fn name_of(node: &Node, digest: Digest) -> String {
    let known = digest.to_string().parse().and_then(|by| node.image(&by));
    let name = known.ok().and_then(|image| image.names.into_iter().next());
    name.map_or_else(|| digest.to_string(), String::from)
}

fn profile_view(node: &Node, profile: &Profile) -> ProfileView {
    let chunks = profile.runs.iter().map(|(_, count)| count).sum();
    ProfileView {
        image: name_of(node, profile.digest),
        digest: profile.digest.to_string(),
        created: profile.created,
        chunks,
        bytes: chunks * CHUNK,
    }
}

fn extent(whole: bool) -> Extent {
    if whole { Extent::Whole } else { Extent::Profile }
}

fn plan_of<'a>(state: &'a mut State, disk: &Name) -> Result<&'a mut Plan> {
    let missing = || {
        let what = format!("disk {disk}: it is not there, or holds images only");
        Error::new(Kind::Unavailable, what)
    };
    let plan = state.plans.get_mut(disk).ok_or_else(missing)?;
    match &plan.off {
        Some(off) => Err(Error::new(Kind::Unavailable, format!("disk {disk}: {off}"))),
        None => Ok(plan),
    }
}

fn disks(state: &State) -> Vec<DiskActivity> {
    let latency = |disk: &DiskStatus| state.signals.latency(&disk.name, disk.tier);
    let there = state
        .disks
        .iter()
        .filter(|disk| matches!(disk.state, DiskState::Present | DiskState::ReadOnly));
    there
        .map(|disk| {
            let own = latency(disk);
            let mut peers: Vec<u64> = state
                .disks
                .iter()
                .filter(|peer| peer.name != disk.name && peer.tier == disk.tier)
                .map(latency)
                .filter(|peer| peer.origin != signal::Origin::Tier)
                .map(|peer| peer.mean)
                .collect();
            peers.sort_unstable();
            let median = peers.get(peers.len() / 2).copied().filter(|median| *median > 0);
            let measured = own.origin != signal::Origin::Tier;
            let seconds = |nanos: u64| nanos as f64 / 1e9;
            let probed = state.probes.of(&disk.name);
            DiskActivity {
                disk: disk.name.clone(),
                tier: disk.tier,
                origin: own.origin.into(),
                reads: own.reads,
                mean_seconds: seconds(own.mean),
                median_seconds: seconds(own.median),
                p99_seconds: seconds(own.p99),
                against_peers: median
                    .filter(|_| measured)
                    .map(|median| own.mean as f64 / median as f64),
                own: probed.map(|it| it.own),
                foreign: probed.map(|it| it.foreign),
                in_flight: probed.map(|it| it.in_flight),
                oldest_seconds: probed.map(|it| it.oldest_seconds),
                queue_seconds: probed.map(|it| it.queue_seconds),
            }
        })
        .collect()
}
