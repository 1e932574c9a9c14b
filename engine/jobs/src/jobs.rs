//! The register of jobs, and the life that all jobs share: from created through pending to gone.
//! Source: `design/qemu-surface.md` 5.3 and 5.4.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use underlay_graph::GraphError;
use underlay_graph::units::is_well_formed_id;
use underlay_sys::rt;

use crate::error::{JobError, Stop};
use crate::event::EventSink;
use crate::group::Group;
use crate::job::Job;
use crate::settings::{JobInfo, Kind, Settings};
use crate::status::Status;

/// How long jobs may take to end at the end of a daemon, and then their nodes to be closed, before targets are given
/// up.
pub const GRACE: Duration = Duration::from_secs(5);

/// The work of one job, to be spawned on an I/O thread. It must run to its end.
pub type JobTask = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A job that has started: it works once its task is spawned.
pub struct Started {
    /// The job.
    pub job: Arc<Job>,
    /// Its work.
    pub task: JobTask,
}

impl std::fmt::Debug for Started {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.job.fmt(f)
    }
}

/// What one kind of job does.
#[async_trait]
pub(crate) trait Work: Send {
    /// The long part. May wait at checkpoints; leaves the wiring as it is.
    async fn run(&mut self, job: &Arc<Job>) -> Result<(), Stop>;
    /// The work is done: puts its result into force. After an error the wiring is as before.
    async fn prepare(&mut self, job: &Arc<Job>) -> Result<(), Stop>;
    /// All that end with it are prepared: what could not be taken back.
    async fn commit(&mut self, _job: &Arc<Job>) {}
    /// The job has ended, and its events are on their way to the clients.
    async fn told(&mut self) {}
    /// The job failed or was cancelled, or another of its group was when this one was prepared: the chain goes back to
    /// its users as it was.
    async fn abandon(&mut self, job: &Arc<Job>);
}

/// All jobs, oldest first.
pub struct Jobs {
    list: Mutex<Vec<Arc<Job>>>,
    sink: Arc<dyn EventSink>,
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.list().iter()).finish()
    }
}

impl Jobs {
    /// No jobs yet; what they have to tell goes to `sink`.
    pub fn new(sink: Arc<dyn EventSink>) -> Arc<Self> {
        Arc::new(Self { list: Mutex::default(), sink })
    }

    fn list(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The job for a job-… command.
    pub fn job(&self, id: &str) -> Result<Arc<Job>, JobError> {
        self.get(id).ok_or(JobError::JobNotFound)
    }

    /// The job for a block-job-… command.
    pub fn block_job(&self, id: &str) -> Result<Arc<Job>, JobError> {
        let job = self.get(id).filter(|job| job.kind().is_block_job());
        job.ok_or_else(|| JobError::BlockJobNotFound(id.to_owned()))
    }

    fn get(&self, id: &str) -> Option<Arc<Job>> {
        self.list().iter().find(|job| job.id() == id).cloned()
    }

    /// All jobs, newest first, as query-jobs lists them; query-block-jobs leaves out those that are no block jobs.
    pub fn query(&self) -> Vec<JobInfo> {
        self.list().iter().rev().map(|job| job.info()).collect()
    }

    /// job-dismiss: a concluded job lets go of its images and vanishes.
    pub async fn dismiss(&self, job: &Job) -> Result<(), JobError> {
        job.let_go().await?;
        let mut list = self.list();
        job.vanish()?;
        list.retain(|other| !std::ptr::eq(&**other, job));
        Ok(())
    }

    /// Ends all jobs, at the end of a daemon: holds them back, then cancels them by force one after the other, newest
    /// first, and waits until each is over. Who does not get there because a target does not answer gives it up. Their
    /// tasks must be running. Those that it has ended.
    pub async fn cancel_all(&self) -> Vec<Arc<Job>> {
        let mut jobs = self.list().clone();
        // Those of a transaction that is being prepared have no task, and will never have one.
        jobs.retain(|job| job.status() != Status::Created);
        jobs.iter().for_each(|job| job.drained_begin());
        let until = rt::now() + GRACE;
        for job in jobs.iter().rev() {
            job.drained_end();
            // Refused by a job that is ending already, which is as good.
            let _ = job.cancel();
            let until = until.max(rt::now() + GRACE / 10);
            if rt::by(Some(until), job.concluded()).await.is_none() {
                job.give_up();
                job.concluded().await;
            }
            if !job.vanishes_by_itself() {
                // Refused only for one that somebody else has just dismissed.
                let _ = self.dismiss(job).await;
            }
        }
        jobs
    }

    /// The id of a new job, from what the command says.
    pub(crate) fn choose_id(&self, settings: &Settings) -> Result<String, JobError> {
        let id = match &settings.id {
            Some(id) => id.clone(),
            None if settings.default_id.is_empty() => return Err(JobError::NoId),
            None => settings.default_id.clone(),
        };
        if settings.id.is_some() && !is_well_formed_id(&id) {
            return Err(JobError::InvalidId(id));
        }
        if self.get(&id).is_some() {
            return Err(JobError::IdInUse(id));
        }
        Ok(id)
    }

    /// A job that nobody sees yet.
    pub(crate) fn draft(&self, id: String, kind: Kind, settings: &Settings) -> Arc<Job> {
        Job::new(id, kind, settings, self.sink.clone())
    }

    /// Shows a job whose chain is prepared, and starts it. On error the work is abandoned.
    pub(crate) async fn launch(
        self: &Arc<Self>,
        job: Arc<Job>,
        settings: &Settings,
        mut work: Box<dyn Work>,
    ) -> Result<Started, JobError> {
        if let Err(error) = self.enlist(&job, settings) {
            work.abandon(&job).await;
            // Nobody can dismiss it.
            job.end_afterlife().await;
            return Err(error);
        }
        job.begin(Status::Running);
        let group = Group::new(std::slice::from_ref(&job));
        Ok(self.started(job, work, group))
    }

    /// The work of a job that runs.
    pub(crate) fn started(
        self: &Arc<Self>,
        job: Arc<Job>,
        work: Box<dyn Work>,
        group: Arc<Group>,
    ) -> Started {
        let (jobs, run) = (self.clone(), job.clone());
        Started { job, task: Box::pin(async move { jobs.live(&run, work, &group).await }) }
    }

    /// Shows a new job.
    pub(crate) fn enlist(&self, job: &Arc<Job>, settings: &Settings) -> Result<(), JobError> {
        {
            let mut list = self.list();
            if list.iter().any(|other| other.id() == job.id()) {
                return Err(JobError::IdInUse(job.id().to_owned()));
            }
            list.push(job.clone());
        }
        job.announce();
        if settings.speed < 0 {
            job.begin(Status::Null);
            self.forget(job);
            return Err(JobError::NegativeSpeed);
        }
        Ok(())
    }

    /// A job that was shown and will not start after all.
    pub(crate) fn withdraw(&self, job: &Arc<Job>) {
        job.withdraw();
        self.forget(job);
    }

    /// A change of the graph that was refused: that users do not get on QEMU finds only when the job is there, so it
    /// shows for a moment.
    pub(crate) fn refused(&self, job: &Arc<Job>, settings: &Settings, why: GraphError) -> JobError {
        if matches!(why, GraphError::Conflict(_) | GraphError::ReadOnly) {
            if let Err(error) = self.enlist(job, settings) {
                return error;
            }
            job.begin(Status::Null);
            self.forget(job);
        }
        why.into()
    }

    fn forget(&self, job: &Arc<Job>) {
        self.list().retain(|other| !Arc::ptr_eq(other, job));
    }

    /// The life of a job from running on.
    async fn live(self: Arc<Self>, job: &Arc<Job>, mut work: Box<dyn Work>, group: &Group) {
        let result = job
            .in_a_hurry(async {
                let worked = work.run(job).await;
                group.finish(job, &mut *work, worked).await
            })
            .await;
        {
            // Who hears that the job is over and asks at once finds it concluded, or gone.
            let mut list = self.list();
            if job.conclude(result) {
                list.retain(|other| !Arc::ptr_eq(other, job));
            }
        }
        group.concluded();
        work.told().await;
    }
}
