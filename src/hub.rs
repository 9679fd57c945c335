//! Models from the Hugging Face hub, by way of its cache, which is shared with the Python tools.
//!
//! hf-hub does the work: requests, the layout of the cache, partial files, locks. Around it stands what it lacks. Its
//! requests wait for a silent server for ever (its agent takes no timeout), and some answers make it panic, so it runs on
//! a thread that is watched. It downloads content again that the cache has from another commit, does not compare the
//! length of what arrives with what was announced, and its own retries can write a part twice; so content is looked for,
//! lengths are compared and retries are made here. It trusts the server with the names of blobs: they are checked, but it
//! asks for them once more. And it sends the token along when it asks the file store that the hub names for a length.

use std::any::Any;
use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::io::{self, ErrorKind};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::api::{Progress, RepoInfo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use indicatif::{DecimalBytes, ProgressBar};

use crate::bundle::HubId;
use crate::error::{Error, Kind, Result};
use crate::files::is_inside;
use crate::weights::read_index;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Downloaded when the repository has them.
const OPTIONAL: [&str; 4] = [TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How to get at models on the hub.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    /// Whether only the cache is looked at.
    offline: bool,
    /// How often the transfer of a file is tried again.
    retries: u32,
    /// How long the server may be silent.
    patience: Duration,
}

impl Hub {
    /// As the environment says, in the variables of the Python tools: `HF_HUB_CACHE`, `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`,
    /// `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.
    pub fn from_env() -> Hub {
        Self::from_vars(|name| env::var(name).ok())
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Hub {
        let var = |name: &str| var(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty());
        let home = var("HF_HOME").map(PathBuf::from);
        let home = home.unwrap_or_else(|| env::home_dir().unwrap_or_default().join(".cache/huggingface"));
        let login = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = var("HF_TOKEN").or_else(|| fs::read_to_string(login).ok());
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Hub {
            endpoint: endpoint.trim_end_matches('/').into(),
            cache: var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
            offline: var("HF_HUB_OFFLINE")
                .is_some_and(|value| ["1", "yes", "on", "true"].iter().any(|on| value.eq_ignore_ascii_case(on))),
            retries: 4,
            patience: Duration::from_secs(60),
        }
    }

    /// The folder of a model in the cache, with everything that runs it. What is missing is downloaded; a branch, such as
    /// `main`, is looked up on the server, but when that cannot be reached and the cache has what the branch last stood
    /// for, then that is it. A commit of which all is in the cache needs no server.
    ///
    /// Errors: Io when the server cannot be reached, breaks off, or wants a token or consent, when the cache cannot be
    /// written, or something is missing offline; Argument when there is no such model or revision; Unsupported when it has
    /// no safetensors weights; Format when the server's answers make no sense.
    pub fn fetch(&self, id: &HubId) -> Result<PathBuf> {
        let api = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_user_agent("mindskip", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|e| Error::new(Kind::Io, e.to_string()).during("setting up downloads"))?;
        let page = format!("{}/{}", self.endpoint, id.repo());
        let (beat, beats) = mpsc::channel();
        let fetch = Fetch { hub: self.clone(), id: id.clone(), api, page: page.clone(), beat };
        let worker = thread::spawn(move || fetch.run());
        let ended = loop {
            if let Err(end) = beats.recv_timeout(self.patience) {
                break end;
            }
        };
        if ended == RecvTimeoutError::Timeout {
            // Nobody listens any more: the thread ends when it next hears from the server.
            let cause = format!("{page} says nothing for {:?}", self.patience);
            return Err(Error::new(Kind::Io, cause).action(AGAIN));
        }
        let panicked = |panic: Box<dyn Any + Send>| {
            Err(nonsense(&page, panic.downcast_ref::<String>().map_or("hf-hub panics", String::as_str)))
        };
        worker.join().unwrap_or_else(panicked)
    }
}

/// One call of [`Hub::fetch`], on its thread.
struct Fetch {
    hub: Hub,
    id: HubId,
    api: Api,
    /// Where people read about it.
    page: String,
    /// Tells that something arrived.
    beat: Sender<()>,
}

impl Fetch {
    fn run(&self) -> Result<PathBuf> {
        let revision = self.id.revision.as_deref().unwrap_or("main");
        let known = self.cache(revision);
        // hf-hub finds files by the commit that it last saw a branch at.
        let cached = match is_commit(revision) {
            true => Some(known.pointer_path(revision)),
            false => known.get(CONFIG).and_then(|path| Some(path.parent()?.to_path_buf())),
        };
        let missing = cached.as_deref().map_or_else(|| Ok(vec![CONFIG.into(), WEIGHTS.into()]), missing);
        if self.hub.offline {
            let missing = missing?.join(", ");
            return cached.filter(|_| missing.is_empty()).ok_or_else(|| {
                let cause = format!("{} is not complete, and HF_HUB_OFFLINE is set; missing: {missing}", self.id);
                Error::new(Kind::Io, cause)
                    .at(&self.hub.cache)
                    .action("run it once without HF_HUB_OFFLINE, or copy the cache from a machine that has it")
            });
        }
        let usable = cached.as_ref().filter(|_| missing.is_ok_and(|missing| missing.is_empty()));
        // Hardly any model lacks a tokenizer. What else there may be is downloaded before the weights.
        if let Some(dir) = usable.filter(|dir| is_commit(revision) && dir.join(TOKENIZER).is_file()) {
            return Ok(dir.clone());
        }

        let info = match (self.look_up(revision), usable) {
            (Ok(info), _) => info,
            (Err(failure), Some(dir)) if is_passing(&failure) => {
                eprintln!("{}; using what is in the cache", self.explain(failure));
                return Ok(dir.clone());
            }
            (Err(failure), _) => return Err(self.explain(failure)),
        };
        let dir = self.download(&info)?;
        if !is_commit(revision) && cached.as_ref() != Some(&dir) {
            known.create_ref(&info.sha).map_err(|e| self.explain(e.into()))?;
        }
        Ok(dir)
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.repo(), RepoType::Model, revision.into())
    }

    fn cache(&self, revision: &str) -> CacheRepo {
        Cache::new(self.hub.cache.clone()).repo(self.repo(revision))
    }

    /// The commit of a revision, and its files.
    fn look_up(&self, revision: &str) -> Result<RepoInfo, ApiError> {
        let request = self.api.repo(self.repo(revision)).info_request().config();
        // A part of the patience: there may be a cache to fall back to.
        let request = request.timeout_global(Some(self.hub.patience / 6)).build();
        let info: RepoInfo = request.call().and_then(|mut answer| answer.body_mut().read_json()).map_err(Box::new)?;
        if is_commit(&info.sha) { Ok(info) } else { Err(ApiError::InvalidHeader("sha")) }
    }

    /// Downloads what the cache lacks of a commit, whose folder is returned.
    fn download(&self, info: &RepoInfo) -> Result<PathBuf> {
        let listed = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
        let weights = [WEIGHTS, INDEX].into_iter().find(|name| listed(name));
        let (true, Some(weights)) = (listed(CONFIG), weights) else {
            let what = if listed(CONFIG) { "safetensors weights" } else { CONFIG };
            let gguf = info.siblings.iter().any(|file| file.rfilename.ends_with(".gguf"));
            return Err(Error::new(Kind::Unsupported, format!("{} has no {what}", self.id)).action(match gguf {
                true => "it has GGUF files, which are not read here: give the model they were made from",
                false => "give a model in the format of transformers",
            }));
        };
        let optional = OPTIONAL.into_iter().filter(|name| listed(name));
        let mut names = [CONFIG].into_iter().chain(optional).chain([weights]);
        names.try_for_each(|name| self.file(&info.sha, name))?;
        let dir = self.cache(&info.sha).pointer_path(&info.sha);
        if weights == INDEX {
            let shards: BTreeSet<String> = read_index(&dir.join(INDEX))?.into_values().collect();
            shards.iter().try_for_each(|name| self.file(&info.sha, name))?;
        }
        Ok(dir)
    }

    /// Downloads a file of a commit, or the rest of it, unless it is there.
    fn file(&self, commit: &str, name: &str) -> Result<()> {
        let mut failures = 0;
        while let Err(failure) = self.transfer(commit, name) {
            if !is_passing(&failure) || failures == self.hub.retries {
                return Err(self.explain(failure).during(format!("downloading {name}")));
            }
            thread::sleep(Duration::from_millis(250) * (1 << failures));
            failures += 1;
        }
        Ok(())
    }

    fn transfer(&self, commit: &str, name: &str) -> Result<(), ApiError> {
        let (repo, cache) = (self.api.repo(self.repo(commit)), self.cache(commit));
        let place = cache.pointer_path(commit).join(name);
        if place.is_file() {
            return Ok(());
        }
        let _ = self.beat.send(());
        let announced = self.api.metadata(&repo.url(name))?;
        if announced.commit_hash() != commit || !is_inside(announced.etag()) {
            return Err(ApiError::InvalidHeader("X-Repo-Commit or ETag"));
        }
        let size = announced.size() as u64;
        let blob = cache.blob_path(announced.etag());
        let length = |path: &Path| fs::metadata(path).map_or(0, |m| m.len());
        if blob.is_file() && length(&blob) == size {
            let blobs = Path::new(&"../".repeat(2 + name.matches('/').count())).join("blobs");
            return Ok(link(&blobs.join(announced.etag()), &place)?);
        }
        let part = blob.with_extension("part");
        if length(&part) >= size {
            let _ = fs::remove_file(&part); // hf-hub would ask for what comes after the end
        }
        let bar = ProgressBar::new(size);
        let what = format!("{}: {name}", self.id);
        if bar.is_hidden() {
            eprintln!("{what}: downloading {}", DecimalBytes(size));
        }
        let meter = Meter { bar, what, part, last: Instant::now(), beat: self.beat.clone() };
        repo.download_with_progress(name, meter)?;
        let arrived = length(&place);
        if arrived != size {
            let _ = (fs::remove_file(&place), fs::remove_file(&blob));
            let cause = format!("{arrived} bytes arrived, {size} were announced");
            return Err(io::Error::new(ErrorKind::UnexpectedEof, cause).into());
        }
        Ok(())
    }

    /// What a failure means, and what to do about it.
    fn explain(&self, failure: ApiError) -> Error {
        let (id, page) = (&self.id, &self.page);
        let io = |cause: String, action: &str| Error::new(Kind::Io, cause).action(action);
        match (status(&failure), failure) {
            (Some(code @ (401 | 403)), _) => io(
                format!("{id} is gated or private, or does not exist, or the token is not valid (status {code})"),
                &format!("check the name; accept the licence at {page} and set HF_TOKEN to a token of that account"),
            ),
            (Some(404), _) => Error::new(Kind::Argument, format!("the hub has no {id}"))
                .action(format!("check the name and the revision (a branch, a tag or a whole commit), see {page}")),
            (Some(code), _) => io(format!("{page} fails with status {code}"), AGAIN),
            (_, ApiError::RequestError(e)) => {
                io(format!("cannot talk to {page}: {e}"), "check the network, HTTPS_PROXY and HF_ENDPOINT")
            }
            (_, ApiError::IoError(e)) if is_of_disk(&e) => {
                io(e.to_string(), "free some space, or set HF_HUB_CACHE to a folder that can be written")
                    .at(&self.hub.cache)
            }
            (_, ApiError::IoError(e)) => io(format!("{page} breaks off: {e}"), AGAIN),
            (_, ApiError::LockAcquisition(_)) => io(format!("another process downloads {id}"), "wait for it"),
            (_, failure) => nonsense(page, &failure.to_string()),
        }
    }
}

const AGAIN: &str = "try again later: what is here already is not downloaded again";

fn nonsense(page: &str, what: &str) -> Error {
    Error::new(Kind::Format, format!("{page} answers with what makes no sense: {what}"))
        .action("check HF_ENDPOINT; what it names does not act as the Hugging Face hub does")
}

/// Those of the files that a model needs that are not in a folder. Errors: Io; Format when its index is damaged.
fn missing(dir: &Path) -> Result<Vec<String>> {
    let mut names = BTreeSet::from([CONFIG.to_string()]);
    match !dir.join(WEIGHTS).is_file() && dir.join(INDEX).is_file() {
        true => names.extend(read_index(&dir.join(INDEX))?.into_values()),
        false => names.extend([WEIGHTS.to_string()]),
    }
    Ok(names.into_iter().filter(|name| !dir.join(name).is_file()).collect())
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The status that the server refused with.
fn status(failure: &ApiError) -> Option<u16> {
    match failure {
        ApiError::RequestError(e) if let ureq::Error::StatusCode(code) = **e => Some(code),
        _ => None,
    }
}

/// Whether it may go well another time.
fn is_passing(failure: &ApiError) -> bool {
    match failure {
        ApiError::RequestError(_) => status(failure).is_none_or(|code| code == 429 || code >= 500),
        ApiError::IoError(e) => !is_of_disk(e),
        _ => matches!(failure, ApiError::LockAcquisition(_)),
    }
}

/// hf-hub does not tell whether it read from the network or wrote to the disk.
fn is_of_disk(error: &io::Error) -> bool {
    use ErrorKind::*;
    matches!(error.kind(), StorageFull | QuotaExceeded | PermissionDenied | ReadOnlyFilesystem | NotADirectory)
}

/// Lets content that is here already be found as a file of a commit, by a link such as hf-hub makes.
fn link(blob: &Path, place: &Path) -> io::Result<()> {
    let folder = place.parent().unwrap_or(place);
    let _ = fs::remove_file(place); // it leads nowhere
    fs::create_dir_all(folder)?;
    #[cfg(unix)]
    return std::os::unix::fs::symlink(blob, place);
    #[cfg(not(unix))] // symbolic links need privileges there
    return fs::hard_link(folder.join(blob), place);
}

/// Shows how far the download of a file is: a bar on a terminal, now and then a line elsewhere.
struct Meter {
    bar: ProgressBar,
    what: String,
    /// Where the file is as long as it is not complete.
    part: PathBuf,
    /// When there was a line.
    last: Instant,
    beat: Sender<()>,
}

impl Progress for Meter {
    fn init(&mut self, size: usize, name: &str) {
        Progress::init(&mut self.bar, size, name);
    }

    /// hf-hub can be stopped only here, and only by unwinding; this way it does so without a message.
    fn update(&mut self, bytes: usize) {
        Progress::update(&mut self.bar, bytes);
        let (done, size) = (self.bar.position(), self.bar.length().unwrap_or(0));
        if done > size {
            let _ = fs::remove_file(&self.part); // perhaps it was sent from the start, and appended to what was here
            resume_unwind(Box::new("a file that is longer than announced".to_string()));
        }
        if self.beat.send(()).is_err() {
            resume_unwind(Box::new(())); // nobody waits for it any more
        }
        if self.bar.is_hidden() && self.last.elapsed() >= Duration::from_secs(10) {
            self.last = Instant::now();
            eprintln!("{}: {} of {}", self.what, DecimalBytes(done), DecimalBytes(size));
        }
    }

    fn finish(&mut self) {
        Progress::finish(&mut self.bar);
    }
}

/// Downloads from a server that this file starts: a repository of a few files, and ways to misbehave.
#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex, MutexGuard};

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::bundle::Bundle;

    const COMMIT: &str = "0123456789012345678901234567890123456789";
    const CONFIG_FILE: (&str, &[u8]) = (CONFIG, b"{}");
    const TOKENIZER_FILE: (&str, &[u8]) = (TOKENIZER, b"{\"a\": 1}");
    /// Nothing listens there.
    const NOWHERE: &str = "http://127.0.0.1:1";

    /// How the server behaves.
    #[derive(Default)]
    struct Rules {
        commit: String,
        files: BTreeMap<String, Vec<u8>>,
        /// The status of every answer about the repository, and about its files.
        api: Option<u16>,
        resolve: Option<u16>,
        /// After how many bytes the next transfers of weights break off.
        cuts: VecDeque<usize>,
        ignores_ranges: bool,
        /// Does not tell where the body ends.
        no_length: bool,
        /// What is said to be the name of every blob.
        etag: Option<String>,
        /// Redirects to nowhere.
        no_location: bool,
        silent_api: bool,
        /// Falls silent amid a transfer.
        silent: bool,
    }

    struct TestServer {
        url: String,
        rules: Arc<Mutex<Rules>>,
        /// Path, range and token of every request.
        log: Arc<Mutex<Vec<String>>>,
    }

    impl TestServer {
        fn start(files: &[(&str, &[u8])]) -> TestServer {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let files = files.iter().map(|(name, content)| (name.to_string(), content.to_vec())).collect();
            let server = TestServer {
                url: format!("http://{}", listener.local_addr().unwrap()),
                rules: Arc::new(Mutex::new(Rules { commit: COMMIT.into(), files, ..Rules::default() })),
                log: Arc::default(),
            };
            let (rules, log) = (server.rules.clone(), server.log.clone());
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (rules, log) = (rules.clone(), log.clone());
                    thread::spawn(move || answer(stream, &rules, &log));
                }
            });
            server
        }

        fn rules(&self) -> MutexGuard<'_, Rules> {
            self.rules.lock().unwrap()
        }

        /// The requests since the last call.
        fn requests(&self) -> Vec<String> {
            std::mem::take(&mut *self.log.lock().unwrap())
        }

        /// The ranges of weights that were asked for since the last call, but for the questions about their length.
        fn transfers(&self) -> Vec<String> {
            let requests = self.requests().into_iter();
            let ranges = requests.filter_map(|r| Some(r.strip_prefix("/cdn/")?.split(' ').nth(1)?.to_string()));
            ranges.filter(|range| range != "bytes=0-0").collect()
        }
    }

    fn answer(mut stream: TcpStream, rules: &Mutex<Rules>, log: &Mutex<Vec<String>>) {
        let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(|line| line.ok());
        let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let Some(path) = head.first().and_then(|request| request.split(' ').nth(1)) else { return };
        let header = |name: &str| head.iter().find_map(|h| h.strip_prefix(name)).unwrap_or_default().trim();
        let range = header("range:");
        log.lock().unwrap().push(format!("{path} {range} {}", header("authorization:")));

        let mut rules = rules.lock().unwrap();
        let send = |stream: &mut TcpStream, status: u16, headers: &str, body: &[u8]| {
            let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}\r\n");
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        };
        let refuse = |stream: &mut TcpStream, status| send(stream, status, "Content-Length: 0\r\n", &[]);
        let in_repo = |place: &str| path.strip_prefix(&format!("/org/name/resolve/{}/{place}", rules.commit));
        let (name, at_store) = match (in_repo(""), path.strip_prefix("/cdn/")) {
            (Some(name), _) => (name, false),
            (_, Some(name)) => (name, true),
            _ if rules.silent_api => {
                drop(rules);
                return thread::sleep(Duration::from_secs(3));
            }
            _ => {
                let revision = path.strip_prefix("/api/models/org/name/revision/");
                if !revision.is_some_and(|revision| revision == "main" || revision == rules.commit) {
                    return refuse(&mut stream, 404);
                }
                if let Some(status) = rules.api {
                    return refuse(&mut stream, status);
                }
                let names: Vec<_> = rules.files.keys().map(|name| json!({"rfilename": name})).collect();
                let text = json!({"sha": rules.commit, "siblings": names}).to_string();
                return send(&mut stream, 200, &format!("Content-Length: {}\r\n", text.len()), text.as_bytes());
            }
        };
        let Some(content) = rules.files.get(name).cloned() else { return refuse(&mut stream, 404) };
        if let Some(status) = rules.resolve {
            return refuse(&mut stream, status);
        }
        // The name of a blob is the hub's affair.
        let etag = rules.etag.clone().unwrap_or_else(|| format!("etag-{}-{}", content.len(), content[0]));
        let mut headers = format!("ETag: \"{etag}\"\r\nX-Repo-Commit: {}\r\n", rules.commit);
        if name.ends_with(".safetensors") && !at_store {
            if !rules.no_location {
                headers += &format!("Location: http://{}/cdn/{name}\r\n", header("host:"));
            }
            return send(&mut stream, 302, &(headers + "Content-Length: 0\r\n"), &[]);
        }
        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let metadata = last == "0";
        let first: usize = if rules.ignores_ranges { 0 } else { first.parse().unwrap() };
        let body = if metadata { &content[..1] } else { &content[first..] };
        headers += &format!("Content-Range: bytes {first}-{}/{}\r\n", first + body.len() - 1, content.len());
        if metadata || !rules.no_length {
            headers += &format!("Content-Length: {}\r\n", body.len());
        }
        let cut = if at_store && !metadata { rules.cuts.pop_front() } else { None };
        let silent = rules.silent && at_store && !metadata;
        drop(rules);
        send(&mut stream, 206, &headers, &body[..cut.unwrap_or(if silent { 1000 } else { body.len() })]);
        if silent {
            thread::sleep(Duration::from_secs(3));
        }
    }

    /// A hub that uses a server and a new cache.
    struct Client {
        hub: Hub,
        dir: TempDir,
    }

    impl Client {
        fn of(url: &str) -> Client {
            let dir = tempfile::tempdir().unwrap();
            let hub = Hub {
                endpoint: url.into(),
                cache: dir.path().into(),
                token: Some("hf_secret".into()),
                offline: false,
                retries: 0,
                patience: Duration::from_secs(20),
            };
            Client { hub, dir }
        }

        fn fetch(&self, id: &str) -> Result<PathBuf> {
            self.hub.fetch(&id.parse().unwrap())
        }

        #[track_caller]
        fn fails(&self, id: &str, kind: Kind, parts: &[&str]) {
            let error = self.fetch(id).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            for part in parts {
                assert!(error.to_string().contains(part), "{part:?} in {error}");
            }
        }

        fn repo(&self) -> PathBuf {
            self.dir.path().join("models--org--name")
        }
    }

    fn names_in(dir: &Path) -> BTreeSet<String> {
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Bytes that no part of repeats.
    fn noise(len: u32) -> Vec<u8> {
        (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn the_environment_is_that_of_the_python_tools() {
        let with = |vars: &[(&str, &str)]| {
            let vars: BTreeMap<String, String> = vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            Hub::from_vars(|name| vars.get(name).cloned())
        };
        let hub = with(&[("HF_HOME", ""), ("HF_HUB_OFFLINE", "0")]);
        assert!(hub.cache.ends_with(".cache/huggingface/hub") && !hub.offline);
        assert_eq!(hub.endpoint, "https://huggingface.co");

        let home = tempfile::tempdir().unwrap();
        let at = |name: &str| home.path().join(name).to_str().unwrap().to_string();
        fs::write(at("token"), "hf_file\n").unwrap();
        fs::write(at("other"), "hf_other\n").unwrap();
        let hub = with(&[("HF_HOME", &at("")), ("HF_ENDPOINT", "http://a/"), ("HF_HUB_OFFLINE", "True")]);
        assert_eq!((hub.cache, hub.token.as_deref()), (home.path().join("hub"), Some("hf_file")));
        assert!(hub.endpoint == "http://a" && hub.offline);
        let hub = with(&[("HF_HOME", &at("")), ("HF_HUB_CACHE", "/c"), ("HF_TOKEN_PATH", &at("other"))]);
        assert_eq!((hub.cache, hub.token.as_deref()), ("/c".into(), Some("hf_other")));
        let hub = with(&[("HF_HOME", &at("")), ("HF_TOKEN", "hf_variable")]);
        assert_eq!(hub.token.as_deref(), Some("hf_variable"));
    }

    #[test]
    fn a_model_is_downloaded_and_runs_and_is_found_again() {
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories");
        let names = [CONFIG, "generation_config.json", TOKENIZER, "tokenizer_config.json", WEIGHTS];
        let contents = names.map(|name| fs::read(assets.join(name)).unwrap());
        let mut files: Vec<(&str, &[u8])> = names.iter().copied().zip(contents.iter().map(Vec::as_slice)).collect();
        files.extend([("README.md", &b"hello"[..]), ("pytorch_model.bin", b"hello")]);
        let server = TestServer::start(&files);
        let mut client = Client::of(&server.url);

        let dir = client.fetch("org/name").unwrap();
        assert_eq!(dir, client.repo().join("snapshots").join(COMMIT));
        let bundle = Bundle::open(&dir).unwrap();
        assert_eq!(bundle.weights.fingerprint(), Bundle::embedded().unwrap().weights.fingerprint());
        assert_eq!(names_in(&dir), names.map(String::from).into());
        #[cfg(unix)]
        assert!(fs::read_link(dir.join(WEIGHTS)).unwrap().starts_with("../../blobs"));
        assert_eq!(fs::read_to_string(client.repo().join("refs/main")).unwrap(), COMMIT);
        let requests = server.requests();
        assert!(requests.iter().all(|r| r.starts_with("/cdn/") || r.ends_with("Bearer hf_secret")), "{requests:#?}");
        assert!(!requests.iter().any(|r| r.contains("README") || r.contains("pytorch")), "{requests:#?}");

        assert_eq!(client.fetch("org/name").unwrap(), dir);
        assert_eq!(server.requests().len(), 1, "whether main has moved is asked, no more");
        client.hub.endpoint = NOWHERE.into();
        assert_eq!(client.fetch(&format!("org/name@{COMMIT}")).unwrap(), dir);
        client.hub.offline = true;
        assert_eq!(client.fetch("org/name").unwrap(), dir);
    }

    #[test]
    fn shards_are_those_of_the_index() {
        let map = r#"{"weight_map": {"a": "1.safetensors", "b": "sub/2.safetensors", "c": "1.safetensors"}}"#;
        let shards = [noise(5000), noise(7000)];
        let mut files: Vec<(&str, &[u8])> = vec![CONFIG_FILE, TOKENIZER_FILE, (INDEX, map.as_bytes())];
        files.extend([("1.safetensors", &shards[0][..]), ("sub/2.safetensors", &shards[1]), ("3.safetensors", b"x")]);
        let server = TestServer::start(&files);
        let mut client = Client::of(&server.url);
        let dir = client.fetch("org/name").unwrap();
        assert_eq!(fs::read(dir.join("1.safetensors")).unwrap(), shards[0]);
        assert_eq!(fs::read(dir.join("sub/2.safetensors")).unwrap(), shards[1]);
        assert_eq!(server.transfers().len(), 2);

        client.hub.offline = true;
        assert_eq!(client.fetch("org/name").unwrap(), dir);
        fs::remove_file(dir.join("sub/2.safetensors")).unwrap();
        client.fails("org/name", Kind::Io, &["missing: sub/2.safetensors; "]);

        // Its content is still in the cache: nothing but the link is made again.
        client.hub.offline = false;
        client.fetch("org/name").unwrap();
        assert_eq!(fs::read(dir.join("sub/2.safetensors")).unwrap(), shards[1]);
        assert_eq!(server.transfers(), [""; 0]);
    }

    #[test]
    fn indices_that_reach_for_other_files_are_refused() {
        for (map, kind, message) in [
            (r#"{"weight_map": {"a": "../../../../evil"}}"#, Kind::Format, "not in its folder"),
            (r#"{"weight_map": {"a": "/evil"}}"#, Kind::Format, "not in its folder"),
            ("[]", Kind::Format, INDEX),
            (r#"{"weight_map": {"a": "absent"}}"#, Kind::Argument, "(while downloading absent)"),
        ] {
            let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (INDEX, map.as_bytes())]);
            Client::of(&server.url).fails("org/name", kind, &[message]);
        }
    }

    #[test]
    fn broken_transfers_go_on_where_they_stopped() {
        let weights = noise(100_000);
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &weights)]);
        let mut client = Client::of(&server.url);
        server.rules().cuts.extend([40_000, 25_000, 0]);
        client.fails("org/name", Kind::Io, &["breaks off", "; try again later: what is here already is not down"]);
        assert!(!client.repo().join("refs/main").exists(), "what is not complete is not what main stands for");
        assert_eq!(server.transfers(), ["bytes=0-"]);

        client.hub.retries = 2;
        let dir = client.fetch("org/name").unwrap();
        assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), weights);
        assert_eq!(server.transfers(), ["bytes=40000-", "bytes=65000-", "bytes=65000-"]);
    }

    #[test]
    fn what_was_left_behind_is_used_if_it_can_be() {
        let weights = noise(100_000);
        for (left, ignores_ranges) in [(200_000, false), (100_000, false), (99_999, true), (40_000, true)] {
            let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &weights)]);
            let client = Client::of(&server.url);
            server.rules().ignores_ranges = ignores_ranges;
            fs::create_dir_all(client.repo().join("blobs")).unwrap();
            fs::write(client.repo().join("blobs/etag-100000-0.part"), noise(left)).unwrap();
            if ignores_ranges {
                client.fails("org/name", Kind::Format, &["a file that is longer than announced; check HF_ENDPOINT"]);
            }
            let dir = client.fetch("org/name").unwrap();
            assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), weights, "{left}");
        }
    }

    #[test]
    fn a_file_of_another_length_is_not_used() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let client = Client::of(&server.url);
        server.rules().no_length = true;
        server.rules().cuts.push_back(999);
        client.fails("org/name", Kind::Io, &["999 bytes arrived, 1000 were announced (while downloading model.safe"]);
        assert!(!names_in(&client.repo().join("snapshots").join(COMMIT)).contains(WEIGHTS));
        let dir = client.fetch("org/name").unwrap();
        assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), noise(1000));
    }

    #[test]
    fn a_new_commit_costs_what_it_changes() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let client = Client::of(&server.url);
        let old = client.fetch("org/name").unwrap();
        server.requests();
        server.rules().commit = "f".repeat(40);
        server.rules().files.insert(CONFIG.into(), b"{ }".into());
        let new = client.fetch("org/name").unwrap();
        assert_eq!(new, client.repo().join("snapshots").join("f".repeat(40)));
        assert_eq!(fs::read(new.join(CONFIG)).unwrap(), b"{ }");
        assert_eq!(fs::read(old.join(CONFIG)).unwrap(), b"{}");
        assert_eq!(fs::read(new.join(WEIGHTS)).unwrap(), noise(1000));
        assert_eq!(server.transfers(), [""; 0]);
        assert_eq!(fs::read_to_string(client.repo().join("refs/main")).unwrap(), "f".repeat(40));
    }

    #[test]
    fn refusals_say_what_to_do() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let mut client = Client::of(&server.url);
        client.fails("org/other", Kind::Argument, &["the hub has no org/other; check the name", "/org/other"]);
        client.fails("org/name@v9", Kind::Argument, &["the hub has no org/name@v9; check the name and the revision"]);
        let accept = format!("accept the licence at {}/org/name and set HF_TOKEN", server.url);
        for status in [401, 403] {
            server.rules().resolve = Some(status);
            client.fails("org/name", Kind::Io, &["org/name is gated or private", &accept, "(while downloading config"]);
            server.rules().api = Some(status);
            client.fails("org/name", Kind::Io, &["org/name is gated or private", &accept]);
            server.rules().api = None;
        }
        server.rules().api = Some(503);
        client.fails("org/name", Kind::Io, &["/org/name fails with status 503; try again later"]);
        server.rules().api = None;
        server.rules().commit = "../../../../x".into();
        client.fails("org/name", Kind::Format, &["makes no sense: Header sha is invalid; check HF_ENDPOINT"]);
        client.hub.endpoint = "huggingface".into();
        client.fails("org/name", Kind::Io, &["cannot talk to huggingface/org/name", "HF_ENDPOINT"]);
    }

    #[test]
    fn repositories_without_a_model_that_runs_are_refused() {
        for (files, message) in [
            (&[("model.Q4.gguf", &b"x"[..])][..], "org/name has no config.json; it has GGUF files"),
            (&[CONFIG_FILE, ("pytorch_model.bin", b"x")], "org/name has no safetensors weights; give a model in"),
        ] {
            let server = TestServer::start(files);
            Client::of(&server.url).fails("org/name", Kind::Unsupported, &[message]);
            assert_eq!(server.requests().len(), 1);
        }
    }

    #[test]
    fn offline_only_the_cache_is_asked() {
        let server = TestServer::start(&[CONFIG_FILE, (WEIGHTS, &noise(1000))]);
        let mut client = Client::of(&server.url);
        client.hub.offline = true;
        let cache = client.dir.path().display().to_string();
        let all = "missing: config.json, model.safetensors; run it once without HF_HUB_OFFLINE";
        client.fails("org/name", Kind::Io, &[&cache, "org/name is not complete", all]);
        client.hub.offline = false;
        let dir = client.fetch("org/name").unwrap();
        server.requests();

        client.hub.offline = true;
        assert_eq!(client.fetch("org/name").unwrap(), dir);
        assert_eq!(client.fetch(&format!("org/name@{COMMIT}")).unwrap(), dir);
        client.fails("org/name@v1", Kind::Io, &[all]);
        fs::remove_file(dir.join(WEIGHTS)).unwrap();
        client.fails("org/name", Kind::Io, &["missing: model.safetensors; "]);
        assert_eq!(server.requests(), [""; 0]);
    }

    #[test]
    fn without_a_server_the_cache_will_do() {
        let server = TestServer::start(&[CONFIG_FILE, (WEIGHTS, &noise(1000))]);
        let mut client = Client::of(&server.url);
        let dir = client.fetch("org/name").unwrap();
        server.rules().api = Some(500);
        assert_eq!(client.fetch("org/name").unwrap(), dir);
        server.rules().api = Some(404);
        client.fails("org/name", Kind::Argument, &["the hub has no org/name"]);
        server.rules().silent_api = true;
        client.hub.patience = Duration::from_secs(2);
        assert_eq!(client.fetch("org/name").unwrap(), dir);
        client.hub.endpoint = NOWHERE.into();
        assert_eq!(client.fetch("org/name").unwrap(), dir);
        fs::remove_file(dir.join(WEIGHTS)).unwrap();
        let parts =
            ["cannot talk to http://127.0.0.1:1/org/name: io: Connection refused", "; check the network, HTTPS"];
        client.fails("org/name", Kind::Io, &parts);
    }

    #[test]
    fn a_silent_server_is_left() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(100_000))]);
        let mut client = Client::of(&server.url);
        client.hub.patience = Duration::from_millis(600);
        server.rules().silent = true;
        let start = Instant::now();
        client.fails("org/name", Kind::Io, &["/org/name says nothing for 600ms; try again"]);
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn hostile_servers_do_no_harm() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let client = Client::of(&server.url);
        server.rules().no_location = true;
        client.fails("org/name", Kind::Format, &["makes no sense: location header in redirect; check HF_ENDPOINT"]);
        server.rules().no_location = false;
        let evil = client.dir.path().join("evil");
        for etag in [evil.to_str().unwrap(), "../../evil", ""] {
            server.rules().etag = Some(etag.into());
            client.fails("org/name", Kind::Format, &["X-Repo-Commit or ETag"]);
        }
        assert_eq!(names_in(client.dir.path()), ["models--org--name".to_string()].into());
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_told_apart() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let mut client = Client::of(&server.url);
        client.hub.cache = client.dir.path().join("file");
        fs::write(&client.hub.cache, "").unwrap();
        client.fails("org/name", Kind::Io, &["/file: Not a directory", "; free some space, or set HF_HUB_CACHE"]);
        assert!(is_of_disk(&ErrorKind::StorageFull.into()) && !is_of_disk(&ErrorKind::ConnectionReset.into()));
    }
}
