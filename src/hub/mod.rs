//! Models from the Hugging Face hub, by way of its cache, which is shared with the Python tools.
//!
//! hf-hub speaks to the server. It knows where the cache is (`HF_HUB_CACHE`, `HF_HOME`), which server is meant
//! (`HF_ENDPOINT`) and which token (`HF_TOKEN`, `HF_TOKEN_PATH`, the file that a login leaves), and tries failed requests
//! again. What it does not do is done here: it downloads files in one piece, unverified, even the text of an error page;
//! here a transfer that breaks goes on where it stopped, also in another run, and what arrives is checked against the
//! names that git gives to contents. It knows no `HF_HUB_OFFLINE`, and waits for a silent server for ever.

mod cache;
mod progress;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt;
use std::future::Future;
use std::path::{Component, Path, PathBuf};
use std::thread;
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClient, HFError, HFRepository, HFResult, RepoTypeModel};
use serde::Deserialize;

use crate::bundle::HubId;
use crate::error::{Error, Kind, Result};
use crate::files;
use cache::{Cache, Partial, Remote, is_commit};
use progress::Meter;

pub use progress::Report;

/// What is downloaded beside the weights. Only the first is in every repository that runs here.
const FILES: [&str; 5] =
    ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Files that are downloaded at a time.
const AT_A_TIME: usize = 4;

/// How to get at models on the hub.
pub struct Hub {
    /// The server; None: `HF_ENDPOINT`, or huggingface.co.
    pub endpoint: Option<String>,
    /// The folder of the cache; None: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in `~/.cache/huggingface`.
    pub cache: Option<PathBuf>,
    /// The token; None: `HF_TOKEN`, or the file that a login leaves.
    pub token: Option<String>,
    /// Whether only the cache is looked at.
    pub offline: bool,
    /// How often a request, or a transfer that does not advance, is tried again.
    pub retries: usize,
    /// How long the server may be silent.
    pub patience: Duration,
    /// Where progress is reported.
    pub report: Report,
}

impl Hub {
    /// As the environment says; `HF_HUB_OFFLINE` may be 1, yes, on or true.
    pub fn from_env() -> Hub {
        Hub {
            endpoint: None,
            cache: None,
            token: None,
            offline: env::var("HF_HUB_OFFLINE").is_ok_and(|value| is_on(&value)),
            retries: 4,
            patience: Duration::from_secs(60),
            report: Report::Stderr,
        }
    }

    /// The folder of a model in the cache, with everything that runs it. What is missing is downloaded; a branch, such as
    /// `main`, is looked up on the server, but when that cannot be reached and the cache has what the branch last stood
    /// for, then that is it. A commit of which all is in the cache needs no server.
    ///
    /// Errors: Io when the server cannot be reached, breaks off, or wants a token or consent, when the disk is full, or
    /// something is missing offline; Argument when there is no such model or revision; Unsupported when it has no
    /// safetensors weights; Format when the server's answers make no sense or a file arrives damaged.
    pub fn fetch(&self, id: &HubId) -> Result<PathBuf> {
        // hf-hub is asynchronous. The thread is for callers that are so, too: a runtime may not start within another.
        thread::scope(|scope| {
            let work = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.map_err(|e| Error::new(Kind::Io, e.to_string()).during("starting a download"))?;
                runtime.block_on(self.fetch_async(id))
            });
            work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    async fn fetch_async(&self, id: &HubId) -> Result<PathBuf> {
        let client = self.client()?;
        let cache = Cache::new(client.cache_dir(), id);
        let revision = id.revision.as_deref().unwrap_or("main");
        let known = cache.commit(revision);
        let cached = known.as_deref().map(|commit| Cached::of(&cache, commit)).transpose()?;
        let usable = cached.as_ref().filter(|c| c.missing.is_empty());
        if self.offline {
            return match (usable, &cached) {
                (Some(usable), _) => Ok(usable.dir.clone()),
                (None, Some(cached)) => Err(offline(id, client.cache_dir(), &cached.missing.join(", "))),
                (None, None) => Err(offline(id, client.cache_dir(), "all of it")),
            };
        }
        if let Some(usable) = usable.filter(|c| is_commit(revision) && c.unknown == 0) {
            return Ok(usable.dir.clone());
        }

        let page = format!("{}/{}", client.endpoint(), id.repo());
        let repo = client.model(&id.owner, &id.name);
        let server = Server { hub: self, id, repo, cache: &cache, page };
        let found = match (server.look_up(revision).await, usable) {
            (Err(failure), Some(usable)) if failure.passing => {
                self.report.line(&format!("{}; using what is in the cache", failure.error));
                return Ok(usable.dir.clone());
            }
            (found, _) => found.map_err(|failure| failure.error)?,
        };
        server.complete(&found).await.map_err(|failure| failure.error)?;
        cache.set_commit(revision, &found.commit)?;
        Ok(cache.snapshot(&found.commit))
    }

    fn client(&self) -> Result<HFClient> {
        let mut builder = HFClient::builder()
            .user_agent(concat!("mindskip/", env!("CARGO_PKG_VERSION")))
            .retry_max_attempts(self.retries);
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(cache) = &self.cache {
            builder = builder.cache_dir(cache);
        }
        if let Some(token) = &self.token {
            builder = builder.token(token);
        }
        builder.build().map_err(|e| {
            Error::new(Kind::Argument, e.to_string())
                .during("setting up downloads")
                .action("check HF_ENDPOINT; it is an address such as https://huggingface.co")
        })
    }
}

fn is_on(value: &str) -> bool {
    ["1", "yes", "on", "true"].iter().any(|on| value.eq_ignore_ascii_case(on))
}

fn offline(id: &HubId, cache: &Path, missing: &str) -> Error {
    Error::new(Kind::Io, format!("{id} is not complete in the cache, and HF_HUB_OFFLINE is set; missing: {missing}"))
        .at(cache)
        .action("run it once without HF_HUB_OFFLINE, or copy the cache from a machine that has it")
}

/// What the cache has of a commit.
struct Cached {
    dir: PathBuf,
    /// Files without which nothing runs.
    missing: Vec<String>,
    /// How many of the other files may or may not exist.
    unknown: usize,
}

impl Cached {
    fn of(cache: &Cache, commit: &str) -> Result<Cached> {
        let dir = cache.snapshot(commit);
        let mut wanted = vec![FILES[0].to_string()];
        match !cache.has(commit, WEIGHTS) && cache.has(commit, INDEX) {
            true => wanted.extend(shards(&dir.join(INDEX))?),
            false => wanted.push(WEIGHTS.into()),
        }
        let unknown = FILES[1..].iter().filter(|name| !cache.has(commit, name) && !cache.lacks(commit, name));
        let unknown: Vec<_> = unknown.collect();
        // Hardly anything runs without a tokenizer: it counts as missing unless it is known that there is none.
        wanted.extend(unknown.first().filter(|name| ***name == FILES[1]).map(|name| name.to_string()));
        wanted.retain(|name| !cache.has(commit, name));
        Ok(Cached { dir, missing: wanted, unknown: unknown.len() })
    }
}

/// The files an index names. Errors: Format when it is damaged or reaches out of its folder.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let parsed: Index = serde_json::from_slice(&files::read(index)?).map_err(|e| {
        Error::new(Kind::Format, format!("not an index of weights: {e}")).at(index).action("use another model")
    })?;
    let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
    let outside = |name: &&String| {
        name.is_empty()
            || !Path::new(name).components().all(|c| matches!(c, Component::Normal(_)))
            || name.contains('\\')
    };
    match names.iter().find(outside) {
        None => Ok(names),
        Some(name) => Err(Error::new(Kind::Format, format!("names {name:?}, which is not in its folder"))
            .at(index)
            .action("do not trust this model; its index reaches for other files")),
    }
}

/// A revision as the server knows it.
struct Found {
    commit: String,
    /// All files.
    names: BTreeSet<String>,
}

/// One repository on the server, and its place in the cache.
struct Server<'a> {
    hub: &'a Hub,
    id: &'a HubId,
    repo: HFRepository<RepoTypeModel>,
    cache: &'a Cache,
    /// Where people read about it.
    page: String,
}

impl Server<'_> {
    async fn look_up(&self, revision: &str) -> Result<Found, Failure> {
        let info = self.ask(self.repo.info().revision(revision).send()).await?;
        let commit = info.sha.filter(|sha| is_commit(sha)).ok_or_else(|| self.nonsense("no commit"))?;
        let names = info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect();
        Ok(Found { commit, names })
    }

    /// Downloads what the cache lacks of a commit.
    async fn complete(&self, found: &Found) -> Result<(), Failure> {
        let listed = |name: &str| found.names.contains(name);
        if !listed(FILES[0]) {
            return Err(self.unsupported(found, FILES[0]).into());
        }
        let mut wanted: Vec<String> = FILES.iter().filter(|name| listed(name)).map(|name| name.to_string()).collect();
        if listed(WEIGHTS) {
            wanted.push(WEIGHTS.into());
        } else if listed(INDEX) {
            self.download(&found.commit, vec![INDEX.into()], &Report::Quiet).await?;
            wanted.extend(shards(&self.cache.snapshot(&found.commit).join(INDEX))?);
        } else {
            return Err(self.unsupported(found, "safetensors weights").into());
        }
        self.download(&found.commit, wanted, &self.hub.report).await?;
        FILES.iter().filter(|name| !listed(name)).for_each(|name| self.cache.set_lacks(&found.commit, name));
        Ok(())
    }

    fn unsupported(&self, found: &Found, what: &str) -> Error {
        let gguf = found.names.iter().any(|name| name.ends_with(".gguf"));
        let action = match gguf {
            true => "it has GGUF files, which are not read here: give the model they were made from",
            false => "give a model in the format of transformers",
        };
        Error::new(Kind::Unsupported, format!("{} has no {what}", self.id)).action(action)
    }

    /// Downloads those of the files that the cache lacks.
    async fn download(&self, commit: &str, mut names: Vec<String>, report: &Report) -> Result<(), Failure> {
        names.retain(|name| !self.cache.has(commit, name));
        if names.is_empty() {
            return Ok(());
        }
        let entries = self.ask(self.repo.get_paths_info().paths(names.clone()).revision(commit).send()).await?;
        let mut known: BTreeMap<String, Remote> = BTreeMap::new();
        for entry in entries {
            if let RepoTreeEntry::File { oid, size, path, lfs, .. } = entry
                && is_commit(&oid)
            {
                known.insert(path.clone(), Remote { name: path, size, git_id: oid, large: lfs.is_some() });
            }
        }
        let mut missing = Vec::new();
        for name in names {
            let file = known.remove(&name).ok_or_else(|| self.nonsense(&format!("nothing about {name}")))?;
            match self.cache.blob(&file) {
                Some(blob) => self.cache.link(commit, &name, &blob)?,
                None => missing.push(file),
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let total = missing.iter().map(|file| file.size).sum();
        let meter = Meter::new(report, self.id.to_string(), missing.len(), total);
        let transfers = missing.iter().map(|file| self.file(commit, file, &meter));
        stream::iter(transfers).buffer_unordered(AT_A_TIME).try_collect::<()>().await?;
        meter.finish();
        Ok(())
    }

    /// Downloads a file, or the rest of it.
    async fn file(&self, commit: &str, file: &Remote, meter: &Meter<'_>) -> Result<(), Failure> {
        let mut waited = false;
        let _lock = loop {
            if let Some(lock) = self.cache.lock(file)? {
                break lock;
            }
            if !waited {
                meter.report_above(&format!("{}: waiting for another process that downloads {}", self.id, file.name));
            }
            waited = true;
            tokio::time::sleep(Duration::from_millis(200)).await; // others must not wait for it, too
        };
        if let Some(blob) = self.cache.blob(file) {
            meter.found(file.size);
            return Ok(self.cache.link(commit, &file.name, &blob)?);
        }

        let mut partial = self.cache.open(file)?;
        meter.found(partial.position);
        let mut in_one_go = partial.position == 0;
        let (mut failures, mut again) = (0, true);
        loop {
            let before = partial.position;
            in_one_go &= before == 0;
            match self.transfer(commit, file, &mut partial, meter).await {
                Ok(()) => {
                    if let Some(blob) = partial.finish()? {
                        return Ok(self.cache.link(commit, &file.name, &blob)?);
                    }
                    meter.lost(partial.position);
                    partial.clear()?;
                    if in_one_go || !again {
                        return Err(self.damaged(file).into());
                    }
                    // Parts of different origin did not fit together: once, all of it is asked for anew.
                    (in_one_go, again) = (true, false);
                }
                Err(failure) if failure.passing && failures < self.hub.retries => {
                    failures = if partial.position > before { 0 } else { failures + 1 };
                    tokio::time::sleep(Duration::from_millis(250) * (1 << failures.min(6))).await;
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Downloads from where the file ends until it is complete, or longer than it should be, or something happens.
    async fn transfer(
        &self,
        commit: &str,
        file: &Remote,
        partial: &mut Partial,
        meter: &Meter<'_>,
    ) -> Result<(), Failure> {
        let rest = file.size - partial.position;
        if rest == 0 {
            return Ok(());
        }
        let range = (partial.position > 0).then_some(partial.position..file.size);
        let request = self.repo.download_file_stream().filename(&file.name).revision(commit).maybe_range(range);
        let (length, mut chunks) = self.ask(request.send()).await?;
        if length.is_some_and(|length| length != rest) {
            // The server sends all of it, whatever was asked for.
            meter.lost(partial.position);
            partial.clear()?;
        }
        while let Some(chunk) = self.ask(async { chunks.next().await.transpose() }).await? {
            if !partial.append(&chunk)? {
                return Ok(());
            }
            meter.add(chunk.len() as u64);
        }
        if partial.position < file.size {
            let cause = format!("{} breaks off after {} of {} bytes", file.name, partial.position, file.size);
            return Err(Failure::passing(Error::new(Kind::Io, cause).action(AGAIN)));
        }
        Ok(())
    }

    /// Waits for an answer, but not for ever.
    async fn ask<T>(&self, answer: impl Future<Output = HFResult<T>>) -> Result<T, Failure> {
        match tokio::time::timeout(self.hub.patience, answer).await {
            Ok(answer) => answer.map_err(|e| self.explain(e)),
            Err(_) => {
                let cause = format!("{} says nothing for {:?}", self.page, self.hub.patience);
                Err(Failure::passing(Error::new(Kind::Io, cause).action(AGAIN)))
            }
        }
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::new(Kind::Format, format!("{} answers with {what}", self.page))
            .action("check HF_ENDPOINT; what it names does not act as the Hugging Face hub does")
    }

    fn damaged(&self, file: &Remote) -> Error {
        Error::new(Kind::Format, format!("{} arrives damaged from {}", file.name, self.page))
            .action("try again; if it stays so, something between here and the server changes files")
    }

    /// What an error of the hub means, and what to do about it.
    fn explain(&self, error: HFError) -> Failure {
        let (id, page) = (self.id, &self.page);
        let fail = |kind, cause: String, action: String| Failure::from(Error::new(kind, cause).action(action));
        let (context, status) = match &error {
            HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::RateLimited { context, .. }
            | HFError::Http { context } => (Some(context), context.status.as_u16()),
            HFError::RepoNotFound { context, .. }
            | HFError::RevisionNotFound { context, .. }
            | HFError::EntryNotFound { context, .. } => (context.as_ref(), 404),
            _ => (None, 0),
        };
        let says = context.and_then(|c| c.server_message.as_deref()).map(|text| format!(" ({})", first_line(text)));
        let says = says.unwrap_or_default();
        let code = context.and_then(|c| c.error_code.as_deref()).unwrap_or_default();
        match (&error, status, code) {
            (_, 401 | 403, "GatedRepo") => fail(
                Kind::Io,
                format!("{id} is gated: its makers ask for consent{says}"),
                format!("accept the licence at {page}, then set HF_TOKEN to a token of that account"),
            ),
            (_, 401, _) => fail(
                Kind::Io,
                format!("{id} does not exist, or is private, or the token is not valid{says}"),
                format!("check the name; for a private or gated model accept the licence at {page} and set HF_TOKEN"),
            ),
            (_, 403, _) => fail(
                Kind::Io,
                format!("{id} is not for everyone{says}"),
                format!("set HF_TOKEN to a token that may read it, and accept the licence at {page} if it has one"),
            ),
            (HFError::EntryNotFound { path, .. }, 404, "" | "EntryNotFound") => {
                fail(Kind::Io, format!("{path} is listed in {id}, but not there"), AGAIN.into())
            }
            (_, 404, "RevisionNotFound") => fail(
                Kind::Argument,
                format!("{} has no revision {}", id.repo(), id.revision.as_deref().unwrap_or("main")),
                format!("give a branch, a tag or a whole commit, see {page}/commits"),
            ),
            (_, 404, _) => fail(
                Kind::Argument,
                format!("there is no model {id}"),
                format!("check the name and revision, see {page}"),
            ),
            (HFError::RateLimited { retry_after, .. }, ..) => {
                let wait = retry_after.map_or_else(|| "a while".into(), |wait| format!("{} s", wait.as_secs()));
                fail(
                    Kind::Io,
                    format!("{page} refuses more requests for now{says}"),
                    format!("wait {wait} and try again; with a token (HF_TOKEN) more are allowed"),
                )
            }
            (HFError::Request { source, .. }, ..) if root(source).is::<serde_json::Error>() => {
                self.nonsense(&format!("something unreadable: {}", root(source))).into()
            }
            (HFError::Request { source, .. }, ..) => {
                let (what, how) = match source.is_connect() {
                    true => ("cannot be reached", OFFLINE),
                    false => ("breaks off", AGAIN),
                };
                Failure::passing(Error::new(Kind::Io, format!("{page} {what}: {}", root(source))).action(how))
            }
            (HFError::Http { .. }, status, _) if status >= 500 => {
                Failure::passing(Error::new(Kind::Io, format!("{page} fails with status {status}{says}")).action(AGAIN))
            }
            (HFError::Xet { .. }, ..) => {
                Failure::passing(Error::new(Kind::Io, format!("{page} breaks off: {}", root(&error))).action(AGAIN))
            }
            _ => fail(Kind::Io, format!("{page}: {}", first_line(&error.to_string())), AGAIN.into()),
        }
    }
}

const AGAIN: &str = "try again later: what is here already is not downloaded again";
const OFFLINE: &str = "check the network, HTTPS_PROXY and HF_ENDPOINT";

/// The cause behind the causes: hf-hub's and reqwest's own texts repeat the address and little else.
fn root<'a>(error: &'a (dyn std::error::Error + 'static)) -> &'a (dyn std::error::Error + 'static) {
    error.source().map_or(error, root)
}

fn first_line(text: &str) -> &str {
    let line = text.trim().lines().next().unwrap_or_default();
    line.char_indices().nth(200).map_or(line, |(end, _)| &line[..end])
}

/// Why a step failed, and whether trying again may help.
struct Failure {
    error: Error,
    passing: bool,
}

impl Failure {
    fn passing(error: Error) -> Failure {
        Failure { error, passing: true }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, passing: false }
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} (passing: {})", self.error, self.passing)
    }
}
