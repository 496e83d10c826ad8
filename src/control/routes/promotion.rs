//! The paths of caches, profiles and what happens on the disks.

use serde::Deserialize;
use underlay_agent::report::{Report, Watch};
use utoipa::IntoParams;

use super::*;
use crate::{catalog::Profile, control::promotion::recording_length};

/// Every disk's cache.
#[utoipa::path(get, path = "/v1/caches", responses((status = 200, body = Vec<CacheView>)))]
pub async fn list_caches(State(service): Node) -> Answer<Vec<CacheView>> {
    Ok(Json(blocking(move || Ok(service.promotion().caches())).await?))
}

/// One disk's cache.
#[utoipa::path(get, path = "/v1/caches/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = CacheView), (status = 404, body = Refusal)))]
pub async fn inspect_cache(State(service): Node, Named(name): Named) -> Answer<CacheView> {
    let caches = blocking(move || Ok(service.promotion().caches())).await?;
    let found = caches.into_iter().find(|cache| cache.disk == name);
    let missing = || {
        let what = format!("disk {name}: nothing is promoted to it; see `underlay cache list`");
        Error::new(Kind::NotFound, what)
    };
    Ok(Json(found.ok_or_else(missing)?))
}

/// Empties caches. What is pinned is promoted anew.
#[utoipa::path(post, path = "/v1/promotion/clear", request_body = ClearCache, responses(
    (status = 200, body = Cleared), (status = 404, body = Refusal)))]
pub async fn clear_caches(
    State(service): Node,
    Input(clear): Input<ClearCache>,
) -> Answer<Cleared> {
    Ok(Json(service.clear_caches(clear).await?))
}

/// Keeps an image, or what its profile names, in the cache of a disk.
#[utoipa::path(post, path = "/v1/promotion/pin", request_body = Warm, responses(
    (status = 200, body = Warming), (status = "4XX", body = Refusal)))]
pub async fn pin(State(service): Node, Input(pin): Input<Warm>) -> Answer<Warming> {
    let (disk, digest) = service.disk_and_image(&pin.disk, &pin.image).await?;
    Ok(Json(service.promotion().pin(disk, digest, pin.extent).await?))
}

/// Keeps an image in the cache of a disk no longer than its reads deserve.
#[utoipa::path(post, path = "/v1/promotion/unpin", request_body = Unpin, responses(
    (status = 200, body = CacheView), (status = "4XX", body = Refusal)))]
pub async fn unpin(State(service): Node, Input(unpin): Input<Unpin>) -> Answer<CacheView> {
    let (disk, digest) = service.disk_and_image(&unpin.disk, &unpin.image).await?;
    service.promotion().unpin(disk.clone(), digest).await?;
    inspect_cache(State(service), Named(disk)).await
}

/// Brings an image, or what its profile names, to the cache of a disk, as far as there is room.
#[utoipa::path(post, path = "/v1/promotion/warm", request_body = Warm, responses(
    (status = 200, body = Warming), (status = "4XX", body = Refusal)))]
pub async fn warm(State(service): Node, Input(warm): Input<Warm>) -> Answer<Warming> {
    let (disk, digest) = service.disk_and_image(&warm.disk, &warm.image).await?;
    Ok(Json(service.promotion().warm(disk, digest, warm.extent).await?))
}

/// Every profile.
#[utoipa::path(get, path = "/v1/profiles", responses((status = 200, body = Vec<ProfileView>)))]
pub async fn list_profiles(State(service): Node) -> Answer<Vec<ProfileView>> {
    Ok(Json(service.promotion().profiles().await?))
}

/// An image's profile: which chunks were read, in which order.
#[utoipa::path(get, path = "/v1/profiles/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Profile), (status = 404, body = Refusal)))]
pub async fn inspect_profile(State(service): Node, Named(name): Named) -> Answer<Profile> {
    let digest = service.image(name).await?.status.digest;
    Ok(Json(service.promotion().profile(digest).await?))
}

/// Forgets an image's profile.
#[utoipa::path(delete, path = "/v1/profiles/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Removed), (status = 404, body = Refusal)))]
pub async fn remove_profile(State(service): Node, Named(name): Named) -> Answer<Removed> {
    let digest = service.image(name.clone()).await?.status.digest;
    match service.promotion().remove_profile(digest).await? {
        true => Ok(Json(Removed { removed: name.into(), note: None })),
        false => Err(Error::new(Kind::NotFound, format!("image {name}: it has no profile")).into()),
    }
}

/// Records which chunks of an image its replicas read, for some time, and keeps that as its profile.
/// Answers with lines. If the client goes away, what was read until then is kept.
#[utoipa::path(post, path = "/v1/profiles/{name}/record", params(("name" = String, Path)),
    request_body = RecordProfile, responses(
    (status = 200, body = Event<ProfileView>, content_type = "application/x-ndjson"),
    (status = 404, body = Refusal)))]
pub async fn record_profile(
    State(service): Node,
    Named(name): Named,
    Input(record): Input<RecordProfile>,
) -> Result<Response, Failure> {
    let length = recording_length(record.seconds)?;
    let recording = service.prepare_recording(name, length).await?;
    Ok(job::stream(service.jobs(), move |job| recording.run(job)))
}

/// What happens right now: latencies of disks, caches, what is read most.
#[utoipa::path(get, path = "/v1/activity", responses((status = 200, body = Activity)))]
pub async fn activity(State(service): Node) -> Answer<Activity> {
    Ok(Json(blocking(move || Ok(service.promotion().activity())).await?))
}

/// Which parts of an image are read from where.
#[utoipa::path(get, path = "/v1/images/{name}/heat", params(("name" = String, Path)), responses(
    (status = 200, body = Heat), (status = 404, body = Refusal)))]
pub async fn heat(State(service): Node, Named(name): Named) -> Answer<Heat> {
    let image = service.image(name).await?.status;
    Ok(Json(blocking(move || Ok(service.promotion().heat(image.digest, image.size))).await?))
}

/// What the agent has already.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Known {
    /// The generation of the watch that it has.
    generation: Option<u64>,
}

/// For the agent: which disks to watch, and where the copies on them lie.
#[utoipa::path(get, path = "/v1/probes/watch", params(Known), responses(
    (status = 200, body = Object), (status = 204, description = "nothing new")))]
pub async fn watch(
    State(service): Node,
    known: Result<Query<Known>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(known) = known.map_err(|error| misshapen(error.body_text()))?;
    let watch: Option<Watch> = service.promotion().watch(known.generation);
    Ok(match watch {
        Some(watch) => Json(watch).into_response(),
        None => StatusCode::NO_CONTENT.into_response(),
    })
}

/// From the agent: what was seen in the last second.
#[utoipa::path(post, path = "/v1/probes/report", request_body = Object, responses(
    (status = 200, description = "taken"), (status = "4XX", body = Refusal)))]
pub async fn report(State(service): Node, Input(report): Input<Report>) -> Answer<()> {
    service.promotion().report(&report);
    Ok(Json(()))
}
