//! blockdev-create: a job around the making of an image. What is made, and how, is the caller's.
//!
//! It is no block job: it is over for `query-jobs` and the job- commands only, it has no BLOCK_JOB_ events, and a
//! client always dismisses it. Making an image has no points at which to pause; a cancel shows when it is made.

use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;

use crate::error::{JobError, Stop};
use crate::job::Job;
use crate::jobs::{Jobs, Started, Work};
use crate::settings::{Kind, Settings};

/// The making of an image; the text of an error is for the client.
pub type Creation = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

impl Jobs {
    /// Starts a job that awaits `creation`.
    pub async fn create(self: &Arc<Self>, id: String, creation: Creation) -> Result<Started, JobError> {
        self.make(id, Kind::Create, creation).await
    }

    /// The same with a job that changes how an image is made: x-blockdev-amend.
    pub async fn amend(self: &Arc<Self>, id: String, amendment: Creation) -> Result<Started, JobError> {
        self.make(id, Kind::Amend, amendment).await
    }

    async fn make(self: &Arc<Self>, id: String, kind: Kind, creation: Creation) -> Result<Started, JobError> {
        let settings = Settings { id: Some(id), auto_dismiss: false, ..Settings::default() };
        let id = self.choose_id(&settings)?;
        let job = self.draft(id, kind, &settings);
        self.launch(job, &settings, Box::new(Create { creation: Some(creation) })).await
    }
}

struct Create {
    creation: Option<Creation>,
}

#[async_trait]
impl Work for Create {
    async fn run(&mut self, job: &Arc<Job>) -> Result<(), Stop> {
        let Some(creation) = self.creation.take() else { return Ok(()) };
        job.set_total(1);
        job.takes_off();
        let made = creation.await;
        job.lands();
        job.advance(1);
        made.map_err(Stop::Failed)
    }

    async fn prepare(&mut self, _job: &Arc<Job>) -> Result<(), Stop> {
        Ok(())
    }

    /// What was made of the image stays: it may have been there before.
    async fn abandon(&mut self, _job: &Arc<Job>) {}
}
