//! Disks asked for their figures, each apart, and waited for with limited patience.
//!
//! Invariant: of each disk at most one question is under way; a disk that hangs costs one thread.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::watch, time::timeout_at};
use uuid::Uuid;

use crate::catalog::{Node, Survey};

/// How long a disk may take to answer.
pub(super) const PATIENCE: Duration = Duration::from_millis(500);

/// What disks said, and who is still being asked.
pub(super) struct Surveys {
    disks: Mutex<HashMap<Uuid, Asked>>,
    /// Told whenever a disk has answered.
    answers: watch::Sender<()>,
}

#[derive(Clone, Default)]
struct Asked {
    /// Since when an answer is awaited.
    since: Option<Instant>,
    told: Option<Told>,
}

/// What a disk said.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub survey: Arc<Survey>,
    at: Instant,
    /// Whether it has left a later question without an answer for longer than [`PATIENCE`].
    pub silent: bool,
}

impl Told {
    pub fn age(&self) -> Duration {
        self.at.elapsed()
    }
}

impl Default for Surveys {
    fn default() -> Surveys {
        Surveys { disks: Mutex::default(), answers: watch::Sender::new(()) }
    }
}

impl Surveys {
    /// Asks `disks`, and forgets all others. Those that aren't there have no answer; nor have those
    /// that hang and never gave one.
    pub async fn ask(self: &Arc<Self>, node: &Node, disks: Vec<Uuid>) -> HashMap<Uuid, Told> {
        self.ask_by(disks, |disk| {
            let node = node.clone();
            move || node.survey(disk)
        })
        .await
    }

    async fn ask_by<A>(
        self: &Arc<Self>,
        disks: Vec<Uuid>,
        question: impl Fn(Uuid) -> A,
    ) -> HashMap<Uuid, Told>
    where
        A: FnOnce() -> Option<Survey> + Send + 'static,
    {
        let mut answers = self.answers.subscribe();
        let now = Instant::now();
        {
            let mut all = self.locked();
            all.retain(|disk, asked| disks.contains(disk) || asked.since.is_some());
            for disk in &disks {
                let asked = all.entry(*disk).or_default();
                if asked.since.is_some() {
                    continue;
                }
                asked.since = Some(now);
                let answer = Answer { surveys: self.clone(), disk: *disk, survey: None };
                let ask = question(*disk);
                tokio::task::spawn_blocking(move || answer.give(ask));
            }
        }
        // One that was asked before, and has not answered in time, is not waited for again.
        let waits = |asked: &Asked| asked.since.is_some_and(|since| since.elapsed() < PATIENCE);
        let all_told = || {
            let all = self.locked();
            !disks.iter().any(|disk| all.get(disk).is_some_and(waits))
        };
        while !all_told() {
            // Told of an answer, or late: either way it is looked again.
            let late = tokio::time::Instant::from_std(now + PATIENCE);
            if timeout_at(late, answers.changed()).await.is_err() {
                break;
            }
        }
        let all = self.locked();
        let told = disks.into_iter().filter_map(|disk| {
            let asked = all.get(&disk)?;
            Some((disk, Told { silent: asked.since.is_some(), ..asked.told.clone()? }))
        });
        told.collect()
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<Uuid, Asked>> {
        // Nothing here panics half way through a change.
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A disk's answer, entered when it is dropped, whatever came of it.
struct Answer {
    surveys: Arc<Surveys>,
    disk: Uuid,
    survey: Option<Survey>,
}

impl Answer {
    fn give(mut self, ask: impl FnOnce() -> Option<Survey>) {
        self.survey = ask();
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let told = self.survey.take().map(|survey| Told {
            survey: Arc::new(survey),
            at: Instant::now(),
            silent: false,
        });
        self.surveys.locked().insert(self.disk, Asked { since: None, told });
        self.surveys.answers.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_disk_that_hangs_holds_nobody_up_for_long() {
        let surveys = Arc::new(Surveys::default());
        let (well, sick, gone) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let (release, hang) = mpsc::channel::<()>();
        let hang = Arc::new(Mutex::new(Some(hang)));
        let questions = Arc::new(Mutex::new(Vec::new()));
        let ask = async |held: bool| {
            let began = Instant::now();
            let told = surveys.ask_by(vec![well, sick, gone], |disk| {
                let (hang, questions) = (hang.clone(), questions.clone());
                move || {
                    questions.lock().unwrap().push(disk);
                    if disk == sick && held {
                        let _ = hang.lock().unwrap().take().unwrap().recv();
                    }
                    let survey = Survey { total_bytes: 7, ..Survey::default() };
                    (disk != gone).then_some(survey)
                }
            });
            (told.await, began.elapsed())
        };
        let (told, _) = ask(false).await;
        assert!(!told[&well].silent && !told[&sick].silent && !told.contains_key(&gone));
        let (told, took) = ask(true).await;
        assert!(!told[&well].silent && told[&sick].silent, "the old answer stays");
        assert!(took >= PATIENCE && took < 4 * PATIENCE, "{took:?}");
        assert!(told[&sick].age() >= PATIENCE && told[&sick].survey.total_bytes == 7);
        // It is neither asked nor waited for again while it owes an answer.
        let (told, took) = ask(true).await;
        assert!(told[&sick].silent && took < PATIENCE, "{took:?}");
        let asked = |disk| questions.lock().unwrap().iter().filter(|it| **it == disk).count();
        assert_eq!((asked(well), asked(sick), asked(gone)), (3, 2, 3));
        release.send(()).unwrap();
        while surveys.locked()[&sick].since.is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(!ask(false).await.0[&sick].silent);
    }
}
