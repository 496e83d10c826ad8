//! The path of events.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{Query, State, rejection::QueryRejection},
    http::header,
    response::{IntoResponse, Response},
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use super::{Failure, Node, misshapen};
use crate::control::{
    api::EventsWanted,
    events::{Events, Heard, Mark, Page},
};

/// Lines that wait for a client who reads slowly; what he misses after them is told as a gap.
const WAITING: usize = 64;
/// Events that are taken at once.
const BATCH: usize = 256;

/// What has happened since the daemon's start, as far as it is kept. Followed, it is answered with
/// lines, for as long as the client listens: an event each, or that some were missed.
#[utoipa::path(get, path = "/v1/events", params(EventsWanted), responses(
    (status = 200, body = Page), (status = "4XX", body = super::Refusal)))]
pub(super) async fn events(
    State(service): Node,
    wanted: Result<Query<EventsWanted>, QueryRejection>,
) -> Result<Response, Failure> {
    let Query(wanted) = wanted.map_err(|error| misshapen(error.body_text()))?;
    let boot = wanted.boot.map(|boot| boot.parse()).transpose();
    let boot = boot.map_err(|_| misshapen("boot: as an event gave it"))?;
    let mark = Mark { seq: wanted.since, boot };
    let events = service.events();
    if !wanted.follow {
        return Ok(Json(events.after(mark, usize::MAX)).into_response());
    }
    let (lines, answer) = mpsc::channel(WAITING);
    tokio::spawn(tell(events.clone(), mark, lines));
    let body = Body::from_stream(ReceiverStream::new(answer).map(Ok::<Bytes, Infallible>));
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

/// Tells what happens after `mark`, until nobody listens or the daemon stops.
async fn tell(events: Arc<Events>, mut mark: Mark, lines: mpsc::Sender<Bytes>) {
    let mut watch = events.watch();
    loop {
        watch.borrow_and_update();
        let Page { boot, gap, events: news, .. } = events.after(mark, BATCH);
        let idle = news.is_empty();
        for heard in gap.map(Heard::Gap).into_iter().chain(news.into_iter().map(Heard::Event)) {
            let (seq, line) = match &heard {
                Heard::Event(entry) => (Some(entry.seq), super::job::line(&heard)),
                // It is followed by an event: that the daemon has started, at least.
                Heard::Gap(_) => (None, super::job::line(&heard)),
            };
            if lines.send(line).await.is_err() {
                return;
            }
            mark = Mark { seq: seq.or(mark.seq), boot: Some(boot) };
        }
        if events.is_closed() {
            return;
        }
        if idle {
            tokio::select! {
                changed = watch.changed() => if changed.is_err() { return },
                () = lines.closed() => return,
            }
        }
    }
}
