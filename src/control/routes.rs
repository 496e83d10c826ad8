//! The paths of the control API: what each takes, calls and gives. The OpenAPI document at
//! `/openapi.json` is made from the same annotations.
//!
//! Handlers hold no logic of their own: they check who asks and what is asked in which form, and
//! hand it to the [`Service`].

mod events;
mod promotion;

use std::{
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    sync::Arc,
};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{
        DefaultBodyLimit, FromRequest, FromRequestParts, Path, Query, Request, State,
        rejection::QueryRejection,
    },
    http::{HeaderMap, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use serde::de::DeserializeOwned;
use utoipa::OpenApi;

use crate::{
    catalog::{DiskStatus, FsckReport, Name},
    control::{
        api::*,
        event::{ErrorBody, Event, Progress, Refusal},
        export::{self, Export},
        job, metrics,
        server::Peer,
        service::{Service, blocking},
        upload,
    },
    error::{Context, Error, Kind, Result},
    image::Source,
};

/// Bytes that the body of a request may have, uploads aside.
const BODY_MAX: usize = 64 << 10;
/// Bytes that a report of the agent may have: as many chunks as it may name, and more.
const REPORT_MAX: usize = 32 << 20;

type Node = State<Arc<Service>>;
type Answer<T> = Result<Json<T>, Failure>;

/// The API over `service`.
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/disks", get(list_disks).post(add_disk))
        .route("/v1/disks/{name}", get(inspect_disk).delete(remove_disk))
        .route("/v1/disks/{name}/drain", post(drain_disk))
        .route("/v1/disks/{name}/undrain", post(undrain_disk))
        .route("/v1/images", get(list_images).post(import_image))
        .route("/v1/images/{name}", get(inspect_image).delete(remove_image).put(upload_image))
        .route("/v1/images/{name}/verify", post(verify_image))
        .route("/v1/images/{name}/copies", post(make_copies))
        .route("/v1/images/{name}/copies/{disk}", delete(remove_copy))
        .route("/v1/replicas", get(list_replicas).post(create_replica))
        .route("/v1/replicas/{name}", get(inspect_replica).delete(remove_replica))
        .route("/v1/replicas/{name}/resize", post(resize_replica))
        .route("/v1/replicas/{name}/migrate", post(migrate_replica))
        .route("/v1/replicas/{name}/flatten", post(flatten_replica))
        .route("/v1/replicas/{name}/settle", post(settle_replica))
        .route("/v1/replicas/{name}/content", get(export_replica).put(import_replica))
        .route("/v1/images/{name}/content", get(export_image))
        .route("/v1/attachments", get(list_attachments).post(attach))
        .route("/v1/attachments/detach", post(detach))
        .route("/v1/caches", get(promotion::list_caches))
        .route("/v1/caches/{name}", get(promotion::inspect_cache))
        .route("/v1/promotion/clear", post(promotion::clear_caches))
        .route("/v1/promotion/pin", post(promotion::pin))
        .route("/v1/promotion/unpin", post(promotion::unpin))
        .route("/v1/promotion/warm", post(promotion::warm))
        .route("/v1/profiles", get(promotion::list_profiles))
        .route(
            "/v1/profiles/{name}",
            get(promotion::inspect_profile).delete(promotion::remove_profile),
        )
        .route("/v1/profiles/{name}/record", post(promotion::record_profile))
        .route("/v1/images/{name}/heat", get(promotion::heat))
        .route("/v1/activity", get(promotion::activity))
        .route("/v1/probes/watch", get(promotion::watch))
        .route(
            "/v1/probes/report",
            post(promotion::report).layer(DefaultBodyLimit::max(REPORT_MAX)),
        )
        .route("/v1/events", get(events::events))
        .route("/v1/fsck", post(fsck))
        .route("/openapi.json", get(openapi))
        .route("/metrics", get(metrics))
        .fallback(async || {
            Failure(Error::new(Kind::NotFound, "no such path in this API; see /openapi.json"))
        })
        .method_not_allowed_fallback(async || {
            let error =
                Error::new(Kind::Invalid, "this path does not take that method; see /openapi.json");
            (StatusCode::METHOD_NOT_ALLOWED, Failure(error)).into_response()
        })
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .with_state(service)
}

/// The document that describes the API.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Underlay control API",
        description = "One base beneath every overlay: disks, images and replicas of a node. \
            Served as HTTP on a Unix socket. Every refusal is a JSON object with an `error`."
    ),
    paths(
        status,
        list_disks,
        add_disk,
        inspect_disk,
        remove_disk,
        drain_disk,
        undrain_disk,
        list_images,
        import_image,
        upload_image,
        inspect_image,
        remove_image,
        verify_image,
        make_copies,
        remove_copy,
        list_replicas,
        create_replica,
        inspect_replica,
        remove_replica,
        resize_replica,
        migrate_replica,
        flatten_replica,
        settle_replica,
        export_replica,
        import_replica,
        export_image,
        list_attachments,
        attach,
        detach,
        promotion::list_caches,
        promotion::inspect_cache,
        promotion::clear_caches,
        promotion::pin,
        promotion::unpin,
        promotion::warm,
        promotion::list_profiles,
        promotion::inspect_profile,
        promotion::remove_profile,
        promotion::record_profile,
        promotion::heat,
        promotion::activity,
        promotion::watch,
        promotion::report,
        events::events,
        fsck,
        metrics,
        openapi
    ),
    components(schemas(Refusal, Progress, crate::control::events::Heard))
)]
struct Document;

/// The OpenAPI document, as text.
pub fn document() -> String {
    // Made of constants: what cannot be told here would be a mistake of ours.
    Document::openapi().to_pretty_json().unwrap_or_default()
}

/// The node: daemon, disks, images, replicas, what is stored and saved.
#[utoipa::path(get, path = "/v1/status", responses((status = 200, body = Status)))]
async fn status(State(service): Node) -> Answer<Status> {
    Ok(Json(service.status().await?))
}

/// Every disk that the node knows, there or not.
#[utoipa::path(get, path = "/v1/disks", responses((status = 200, body = Vec<DiskStatus>)))]
async fn list_disks(State(service): Node) -> Answer<Vec<DiskStatus>> {
    Ok(Json(service.disks().await?))
}

/// Gives a disk to underlay. Adding it twice is no error.
#[utoipa::path(post, path = "/v1/disks", request_body = AddDisk, responses(
    (status = 200, body = DiskStatus), (status = "4XX", body = Refusal)))]
async fn add_disk(State(service): Node, Input(disk): Input<AddDisk>) -> Answer<DiskStatus> {
    Ok(Json(service.add_disk(disk).await?))
}

/// One disk.
#[utoipa::path(get, path = "/v1/disks/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = DiskStatus), (status = 404, body = Refusal)))]
async fn inspect_disk(State(service): Node, Named(name): Named) -> Answer<DiskStatus> {
    Ok(Json(service.disk(name).await?))
}

/// Forgets a disk that nothing uses.
#[utoipa::path(delete, path = "/v1/disks/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Removed), (status = 409, body = Refusal)))]
async fn remove_disk(State(service): Node, Named(name): Named) -> Answer<Removed> {
    Ok(Json(service.remove_disk(name).await?))
}

/// Every image.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = Vec<ImageView>)))]
async fn list_images(State(service): Node) -> Answer<Vec<ImageView>> {
    Ok(Json(service.images().await?))
}

/// Imports an image from a file or URL. Answers with lines: progress, then the image or an error.
#[utoipa::path(post, path = "/v1/images", request_body = ImportImage, responses(
    (status = 200, body = Event<ImageView>, content_type = "application/x-ndjson"),
    (status = "4XX", body = Refusal)))]
async fn import_image(
    State(service): Node,
    Extension(peer): Extension<Peer>,
    Input(request): Input<ImportImage>,
) -> Result<Response, Failure> {
    let mut path = None;
    let source = match request.source {
        ImportSource::File(file) => {
            let opened = open_for(&peer, &file).await?;
            path = Some(file.path);
            opened
        }
        ImportSource::Url(url) => match Source::parse(&url)? {
            source @ Source::Url(_) => source,
            _ => return Err(Error::new(Kind::Invalid, "the URL must be http or https").into()),
        },
    };
    let options = UploadOptions {
        disk: request.disk,
        format: request.format,
        sha256: request.sha256,
        source: None,
    };
    let prepared = service.prepare_import(request.name.parse()?, options).await?;
    let prepared = match path {
        Some(path) => prepared.at_path(path),
        None => prepared,
    };
    Ok(job::stream(service.jobs(), move |job| prepared.import(source, job)))
}

/// Imports an image from the body of the request. Answers, while it reads, as POST /v1/images does.
#[utoipa::path(put, path = "/v1/images/{name}", params(("name" = String, Path), UploadOptions),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 200, body = Event<ImageView>, content_type = "application/x-ndjson"),
    (status = "4XX", body = Refusal)))]
async fn upload_image(
    State(service): Node,
    Named(name): Named,
    options: Result<Query<UploadOptions>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let Query(mut options) = options.map_err(|error| misshapen(error.body_text()))?;
    let called = options.source.take().unwrap_or_else(|| "the upload".to_owned());
    let length = axum::body::HttpBody::size_hint(request.body()).exact();
    let prepared = match service.prepare_import(name, options).await {
        Ok(prepared) => prepared,
        Err(error) => {
            upload::refuse(request.into_body());
            return Err(error.into());
        }
    };
    let reader = Box::new(upload::reader(request.into_body()));
    let source = Source::Stream { name: called, reader, length };
    Ok(job::stream(service.jobs(), move |job| prepared.import(source, job)))
}

/// One image.
#[utoipa::path(get, path = "/v1/images/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = ImageView), (status = 404, body = Refusal)))]
async fn inspect_image(State(service): Node, Named(name): Named) -> Answer<ImageView> {
    Ok(Json(service.image(name).await?))
}

/// Removes a name of an image; with its last name, the image. One in use is refused.
#[utoipa::path(delete, path = "/v1/images/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Removed), (status = 409, body = Refusal)))]
async fn remove_image(State(service): Node, Named(name): Named) -> Answer<Removed> {
    Ok(Json(service.remove_image(name).await?))
}

/// Makes copies of an image on other disks. Answers with lines.
#[utoipa::path(post, path = "/v1/images/{name}/copies", params(("name" = String, Path)),
    request_body = MakeCopies, responses(
    (status = 200, body = Event<ImageView>, content_type = "application/x-ndjson"),
    (status = "4XX", body = Refusal)))]
async fn make_copies(
    State(service): Node,
    Named(name): Named,
    Input(wish): Input<MakeCopies>,
) -> Result<Response, Failure> {
    let copies = service.prepare_copies(name, wish).await?;
    Ok(job::stream(service.jobs(), move |job| copies.run(job)))
}

/// Gives up the copy of an image on a disk. The last one is refused.
#[utoipa::path(delete, path = "/v1/images/{name}/copies/{disk}",
    params(("name" = String, Path), ("disk" = String, Path), RemoveCopy), responses(
    (status = 200, body = ImageView), (status = "4XX", body = Refusal)))]
async fn remove_copy(
    State(service): Node,
    Path((name, disk)): Path<(String, String)>,
    how: Result<Query<RemoveCopy>, QueryRejection>,
) -> Answer<ImageView> {
    let Query(how) = how.map_err(|error| misshapen(error.body_text()))?;
    Ok(Json(service.remove_copy(name.parse()?, disk.parse()?, how.force).await?))
}

/// Reads an image whole and compares it with its checksums. Answers with lines.
#[utoipa::path(post, path = "/v1/images/{name}/verify", params(("name" = String, Path)), responses(
    (status = 200, body = Event<Verification>, content_type = "application/x-ndjson"),
    (status = 404, body = Refusal)))]
async fn verify_image(State(service): Node, Named(name): Named) -> Result<Response, Failure> {
    let verify = service.prepare_verify(name).await?;
    Ok(job::stream(service.jobs(), move |job| verify.run(job)))
}

/// Every replica.
#[utoipa::path(get, path = "/v1/replicas", responses((status = 200, body = Vec<ReplicaView>)))]
async fn list_replicas(State(service): Node) -> Answer<Vec<ReplicaView>> {
    Ok(Json(service.replicas().await?))
}

/// Creates a replica of an image.
#[utoipa::path(post, path = "/v1/replicas", request_body = CreateReplica, responses(
    (status = 200, body = ReplicaView), (status = "4XX", body = Refusal)))]
async fn create_replica(
    State(service): Node,
    Input(replica): Input<CreateReplica>,
) -> Answer<ReplicaView> {
    Ok(Json(service.create_replica(replica).await?))
}

/// One replica.
#[utoipa::path(get, path = "/v1/replicas/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = ReplicaView), (status = 404, body = Refusal)))]
async fn inspect_replica(State(service): Node, Named(name): Named) -> Answer<ReplicaView> {
    Ok(Json(service.replica(name).await?))
}

/// Removes a replica and all that was written to it. One with clients is refused.
#[utoipa::path(delete, path = "/v1/replicas/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Removed), (status = 409, body = Refusal)))]
async fn remove_replica(State(service): Node, Named(name): Named) -> Answer<Removed> {
    Ok(Json(service.remove_replica(name).await?))
}

/// Grows a replica, attached or not.
#[utoipa::path(post, path = "/v1/replicas/{name}/resize", params(("name" = String, Path)),
    request_body = Resize,
    responses((status = 200, body = ReplicaView), (status = "4XX", body = Refusal)))]
async fn resize_replica(
    State(service): Node,
    Named(name): Named,
    Input(resize): Input<Resize>,
) -> Answer<ReplicaView> {
    Ok(Json(service.resize_replica(name, resize.size).await?))
}

/// Moves a replica to another disk while it is in use. Answers with lines: progress, then what has
/// become of it. Whoever goes away before that gives it up: then nothing has happened.
#[utoipa::path(post, path = "/v1/replicas/{name}/migrate", params(("name" = String, Path)),
    request_body = Migrate, responses(
    (status = 200, body = Event<Reworked>, content_type = "application/x-ndjson"),
    (status = "4XX", body = Refusal)))]
async fn migrate_replica(
    State(service): Node,
    Named(name): Named,
    Input(to): Input<Migrate>,
) -> Result<Response, Failure> {
    let prepared = service.prepare_move(name, to).await?;
    Ok(job::stream(service.jobs(), move |job| prepared.run(job)))
}

/// Copies what a replica still reads from its image, while it is in use, until it needs none. Answers
/// with lines. Given up, it has copied some; the next time goes on there.
#[utoipa::path(post, path = "/v1/replicas/{name}/flatten", params(("name" = String, Path)),
    request_body = Flatten, responses(
    (status = 200, body = Event<Reworked>, content_type = "application/x-ndjson"),
    (status = "4XX", body = Refusal)))]
async fn flatten_replica(
    State(service): Node,
    Named(name): Named,
    Input(how): Input<Flatten>,
) -> Result<Response, Failure> {
    let prepared = service.prepare_flatten(name, how).await?;
    Ok(job::stream(service.jobs(), move |job| prepared.run(job)))
}

/// Takes a replica up where it was before a move that was interrupted, and gives up what may be on the
/// disk that it was to move to: for when that disk is lost.
#[utoipa::path(post, path = "/v1/replicas/{name}/settle", params(("name" = String, Path)),
    responses((status = 200, body = ReplicaView), (status = "4XX", body = Refusal)))]
async fn settle_replica(State(service): Node, Named(name): Named) -> Answer<ReplicaView> {
    Ok(Json(service.settle_replica(name).await?))
}

/// The content of a replica as a stream of pieces (docs/FORMAT.md): what isn't zeros, or what the
/// overlay holds.
#[utoipa::path(get, path = "/v1/replicas/{name}/content",
    params(("name" = String, Path), ExportOptions), responses(
    (status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
    (status = "4XX", body = Refusal)))]
async fn export_replica(
    State(service): Node,
    Named(name): Named,
    options: Result<Query<ExportOptions>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(options) = options.map_err(|error| misshapen(error.body_text()))?;
    Ok(pour(service.prepare_export(name, options).await?))
}

/// Makes a replica of an overlay that was exported. Answers, while it reads, with lines.
#[utoipa::path(put, path = "/v1/replicas/{name}/content",
    params(("name" = String, Path), ImportOptions),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"), responses(
    (status = 200, body = Event<ReplicaView>, content_type = "application/x-ndjson"),
    (status = "4XX", body = Refusal)))]
async fn import_replica(
    State(service): Node,
    Named(name): Named,
    options: Result<Query<ImportOptions>, QueryRejection>,
    request: Request,
) -> Result<Response, Failure> {
    let Query(options) = options.map_err(|error| misshapen(error.body_text()))?;
    let prepared = match service.prepare_overlay(name, options).await {
        Ok(prepared) => prepared,
        Err(error) => {
            upload::refuse(request.into_body());
            return Err(error.into());
        }
    };
    let reader = upload::reader(request.into_body());
    Ok(job::stream(service.jobs(), move |job| prepared.run(reader, job)))
}

/// The content of an image as a stream of pieces (docs/FORMAT.md): what isn't zeros.
#[utoipa::path(get, path = "/v1/images/{name}/content", params(("name" = String, Path)), responses(
    (status = 200, body = Vec<u8>, content_type = "application/octet-stream"),
    (status = "4XX", body = Refusal)))]
async fn export_image(State(service): Node, Named(name): Named) -> Result<Response, Failure> {
    Ok(pour(service.prepare_image_export(name).await?))
}

/// The stream of an export, for as long as somebody reads it.
fn pour(prepared: Export) -> Response {
    let (sender, pieces) = export::body();
    tokio::task::spawn_blocking(move || prepared.run(sender));
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(pieces));
    ([(header::CONTENT_TYPE, "application/octet-stream")], body).into_response()
}

/// Moves every replica of a disk to other disks, while they are in use; the disk takes nothing new from
/// then on. Answers with lines. Given up, what has moved has moved; the next time goes on there.
#[utoipa::path(post, path = "/v1/disks/{name}/drain", params(("name" = String, Path)),
    request_body = Drain, responses(
    (status = 200, body = Event<Drained>, content_type = "application/x-ndjson"),
    (status = "4XX", body = Refusal)))]
async fn drain_disk(
    State(service): Node,
    Named(name): Named,
    Input(drain): Input<Drain>,
) -> Result<Response, Failure> {
    let prepared = service.prepare_drain(name, drain).await?;
    Ok(job::stream(service.jobs(), move |job| prepared.run(job)))
}

/// Lets a disk that was drained take new things again.
#[utoipa::path(post, path = "/v1/disks/{name}/undrain", params(("name" = String, Path)),
    responses((status = 200, body = DiskStatus), (status = "4XX", body = Refusal)))]
async fn undrain_disk(State(service): Node, Named(name): Named) -> Answer<DiskStatus> {
    Ok(Json(service.set_draining(&name, false).await?))
}

/// Every export that is a block device of this host.
#[utoipa::path(get, path = "/v1/attachments",
    responses((status = 200, body = Vec<AttachmentView>)))]
async fn list_attachments(State(service): Node) -> Answer<Vec<AttachmentView>> {
    Ok(Json(service.attachments()))
}

/// Makes a block device of an export. One that is attached already stays as it is.
#[utoipa::path(post, path = "/v1/attachments", request_body = Attach,
    responses((status = 200, body = AttachmentView), (status = "4XX", body = Refusal)))]
async fn attach(State(service): Node, Input(attach): Input<Attach>) -> Answer<AttachmentView> {
    Ok(Json(service.attach(attach).await?))
}

/// Removes a block device. One that is open is refused, unless forced.
#[utoipa::path(post, path = "/v1/attachments/detach", request_body = Detach,
    responses((status = 200, body = AttachmentView), (status = "4XX", body = Refusal)))]
async fn detach(State(service): Node, Input(detach): Input<Detach>) -> Answer<AttachmentView> {
    Ok(Json(service.detach(detach).await?))
}

/// Looks for what a crash can leave behind, and mends it if asked to.
#[utoipa::path(post, path = "/v1/fsck", request_body = FsckRequest,
    responses((status = 200, body = FsckReport)))]
async fn fsck(State(service): Node, Input(request): Input<FsckRequest>) -> Answer<FsckReport> {
    Ok(Json(service.fsck(request).await?))
}

/// Figures for Prometheus, in the OpenMetrics text format where that is accepted.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String)))]
pub(super) async fn metrics(State(service): Node, headers: HeaderMap) -> Result<Response, Failure> {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let format = metrics::PageFormat::accepted(accept);
    let text = service.metrics(format).await?;
    Ok(([(header::CONTENT_TYPE, format.content_type())], text).into_response())
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", responses((status = 200, body = Object)))]
async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document()).into_response()
}

/// Opens a file for a client who could have read it himself.
async fn open_for(peer: &Peer, file: &FileSource) -> Result<Source> {
    if !peer.is_trusted() {
        return Err(Error::new(
            Kind::Permission,
            "only the daemon's own user may have it read files; send the content instead",
        ));
    }
    let (path, inode) = (file.path.clone(), (file.device, file.inode));
    blocking(move || {
        let name = path.display().to_string();
        // Neither a pipe nor a device may hold the open up.
        let opened = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path)
            .context(|| format!("opening {name}"))?;
        let metadata = opened.metadata().context(|| format!("examining {name}"))?;
        if (metadata.dev(), metadata.ino()) != inode {
            return Err(Error::new(
                Kind::NotFound,
                format!("the daemon sees another file at {name}; send the content instead"),
            ));
        }
        Ok(Source::File { name, file: opened })
    })
    .await
}

/// A refusal, as the client gets it.
pub struct Failure(Error);

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.kind().http());
        let body = Refusal { error: ErrorBody::from(&self.0) };
        tracing::debug!(error = %self.0, "refused");
        (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), Json(body)).into_response()
    }
}

fn misshapen(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Invalid, format!("{why}; see /openapi.json"))
}

/// A JSON body; what doesn't fit its type is refused in our words.
struct Input<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Input<T> {
    type Rejection = Failure;

    async fn from_request(request: Request<Body>, state: &S) -> Result<Input<T>, Failure> {
        let body = axum::body::Bytes::from_request(request, state)
            .await
            .map_err(|error| misshapen(error.body_text()))?;
        let value = serde_json::from_slice(&body)
            .map_err(|error| misshapen(format_args!("the body of the request: {error}")))?;
        Ok(Input(value))
    }
}

/// The name in a path.
struct Named(Name);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Named, Failure> {
        let Path(name) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|error| misshapen(error.body_text()))?;
        Ok(Named(name.parse()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_described() {
        let document: serde_json::Value = serde_json::from_str(&document()).unwrap();
        let mut described = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                assert!(operation["summary"].is_string(), "{method} {path}");
                assert!(operation["responses"]["200"].is_object(), "{method} {path}");
                described.push(format!("{method} {path}"));
            }
        }
        assert_eq!(described.len(), 47, "{described:?}");
        // References within the document lead somewhere.
        let text = document.to_string();
        for reference in text.split("\"$ref\":\"#/components/schemas/").skip(1) {
            let name = &reference[..reference.find('"').unwrap()];
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
    }
}
