//! Models from the Hugging Face hub, by way of its cache, which is shared with the Python tools.
//!
//! ```text
//! models--org--name/refs/main                  the commit that a branch or tag was last seen at
//! models--org--name/snapshots/{commit}/{file}  a link to its blob
//! models--org--name/blobs/{sha256 or git id}   content, complete
//! ```
//!
//! hf-hub, the library for this, is not used. Version 1 brings an asynchronous runtime and Xet. The blocking side of 0.5
//! accepts gzip, and then CloudFront, which serves the text files of the hub, ignores the ranges it asks for: a tokenizer
//! fails with "Header Content-Range is missing" (its issue 141). Nor does it time out, compare lengths, know that content
//! is in the cache from another commit, or keep the token to the hub.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use serde::Deserialize;
use ureq::Agent;
use ureq::config::RedirectAuthHeaders;

use crate::bundle::HubId;
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::weights::read_index;

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Downloaded when the repository has them.
const OPTIONAL: [&str; 4] = [TOKENIZER, "tokenizer_config.json", "chat_template.jinja", "generation_config.json"];
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What is seen of a download on a terminal; elsewhere there are lines.
const BAR: &str = "{msg} {wide_bar} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}, {eta}";

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
        let is_on = |value: String| ["1", "yes", "on", "true"].iter().any(|on| value.eq_ignore_ascii_case(on));
        Hub {
            endpoint: endpoint.trim_end_matches('/').into(),
            cache: var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty()),
            offline: var("HF_HUB_OFFLINE").is_some_and(is_on),
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
        let agent = Agent::config_builder()
            .user_agent(concat!("mindskip/", env!("CARGO_PKG_VERSION")))
            .redirect_auth_headers(RedirectAuthHeaders::SameHost) // not the stores that large files are redirected to
            .timeout_resolve(Some(self.patience))
            .timeout_connect(Some(self.patience))
            .timeout_per_read(Some(self.patience))
            .build();
        Repo {
            hub: self,
            id,
            agent: agent.into(),
            page: format!("{}/{}", self.endpoint, id.repo()),
            dir: self.cache.join(format!("models--{}--{}", id.owner, id.name)),
        }
        .fetch()
    }
}

/// A repository, on the server and in the cache.
struct Repo<'a> {
    hub: &'a Hub,
    id: &'a HubId,
    agent: Agent,
    /// Where people read about it.
    page: String,
    dir: PathBuf,
}

/// A revision, as the server describes it.
#[derive(Deserialize)]
struct Revision {
    /// The commit.
    sha: String,
    siblings: Vec<Remote>,
}

/// A file of a commit.
#[derive(Deserialize)]
struct Remote {
    rfilename: String,
    #[serde(default)]
    size: u64,
    /// Its name in git.
    #[serde(default, rename = "blobId")]
    blob: String,
    /// Large files are stored beside git.
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl Repo<'_> {
    fn fetch(&self) -> Result<PathBuf> {
        let revision = self.id.revision.as_deref().unwrap_or("main");
        let reference = self.dir.join("refs").join(revision);
        let commit = match is_hex(revision, 40) {
            true => Some(revision.to_string()),
            false => fs::read_to_string(&reference).ok().filter(|commit| is_hex(commit, 40)),
        };
        let cached = commit.as_ref().map(|commit| self.snapshot(commit));
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
        let usable = cached.filter(|_| missing.is_ok_and(|missing| missing.is_empty()));
        // Hardly any model lacks a tokenizer. What else there may be is downloaded before the weights.
        if let Some(dir) = usable.as_ref().filter(|dir| is_hex(revision, 40) && dir.join(TOKENIZER).is_file()) {
            return Ok(dir.clone());
        }

        let found = match (self.look_up(revision), usable) {
            (Ok(found), _) => found,
            (Err(error), Some(dir)) if is_passing(&error) => {
                eprintln!("{}; using what is in the cache", self.explain(error));
                return Ok(dir);
            }
            (Err(error), _) => return Err(self.explain(error)),
        };
        if !is_hex(&found.sha, 40) {
            return Err(self.nonsense("no commit"));
        }
        self.download(&found)?;
        if commit.as_ref() != Some(&found.sha) {
            reference.parent().map_or(Ok(()), fs::create_dir_all).map_err(|e| on_disk(&reference, e))?;
            files::write_atomically(&reference, |file| file.write_all(found.sha.as_bytes()))?;
        }
        Ok(self.snapshot(&found.sha))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    fn get(&self, url: &str) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        // Compressed content cannot be asked for by range.
        let request = self.agent.get(url).header("Accept-Encoding", "identity");
        match &self.hub.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn look_up(&self, revision: &str) -> Result<Revision, ureq::Error> {
        let (endpoint, repo) = (&self.hub.endpoint, self.id.repo());
        let url = format!("{endpoint}/api/models/{repo}/revision/{}?blobs=true", encode(revision, ""));
        // A part of the patience: there may be a cache to fall back to.
        let request = self.get(&url).config().timeout_global(Some(self.hub.patience / 6)).build();
        request.call()?.body_mut().read_json()
    }

    /// Downloads what the cache lacks of a commit.
    fn download(&self, found: &Revision) -> Result<()> {
        let listed = |name: &str| found.siblings.iter().find(|file| file.rfilename == name);
        let (Some(config), Some(weights)) = (listed(CONFIG), listed(WEIGHTS).or_else(|| listed(INDEX))) else {
            let what = if listed(CONFIG).is_some() { "safetensors weights" } else { CONFIG };
            let gguf = found.siblings.iter().any(|file| file.rfilename.ends_with(".gguf"));
            return Err(Error::new(Kind::Unsupported, format!("{} has no {what}", self.id)).action(match gguf {
                true => "it has GGUF files, which are not read here: give the model they were made from",
                false => "give a model in the format of transformers",
            }));
        };
        let optional = OPTIONAL.iter().filter_map(|name| listed(name));
        let mut needed = [config].into_iter().chain(optional).chain([weights]);
        needed.try_for_each(|file| self.file(&found.sha, file))?;
        if weights.rfilename == INDEX {
            let shards: BTreeSet<_> = read_index(&self.snapshot(&found.sha).join(INDEX))?.into_values().collect();
            for name in shards {
                let shard = listed(&name).ok_or_else(|| self.nonsense(&format!("no {name}, which its index names")))?;
                self.file(&found.sha, shard)?;
            }
        }
        Ok(())
    }

    /// Downloads a file of a commit, or the rest of it, unless it is there.
    fn file(&self, commit: &str, file: &Remote) -> Result<()> {
        let name = &file.rfilename;
        let place = self.snapshot(commit).join(name);
        if place.is_file() {
            return Ok(());
        }
        let id = file.lfs.as_ref().map_or(&file.blob, |lfs| &lfs.sha256);
        if !is_hex(id, 40) && !is_hex(id, 64) {
            return Err(self.nonsense(&format!("no content of {name}")));
        }
        let blob = self.dir.join("blobs").join(id);
        if !blob.metadata().is_ok_and(|m| m.len() == file.size) {
            let path = blob.with_extension("mindskip"); // other tools name and lock theirs in other ways
            let fail = |e| on_disk(&path, e);
            fs::create_dir_all(self.dir.join("blobs")).map_err(fail)?;
            let mut part = File::options().append(true).create(true).open(&path).map_err(fail)?;
            if let Err(TryLockError::WouldBlock) = part.try_lock() {
                eprintln!("{}: waiting for another process that downloads {name}", self.id);
                part.lock().map_err(fail)?;
                drop(part);
                return self.file(commit, file); // it should be there now
            }
            let mut failures = 0;
            while let Err(error) = self.append(commit, file, &mut part, &path)? {
                if !is_passing(&error) || failures == self.hub.retries {
                    return Err(self.explain(error).during(format!("downloading {name}")));
                }
                thread::sleep(Duration::from_millis(250) * (1 << failures));
                failures += 1;
            }
            part.sync_all().and_then(|()| fs::rename(&path, &blob)).map_err(fail)?;
        }
        let target = Path::new(&"../".repeat(2 + name.matches('/').count())).join("blobs").join(id);
        link(&target, &place).map_err(|e| on_disk(&place, e))
    }

    /// Downloads what a part of a file lacks. An error of the network is within: another time it may go well.
    fn append(&self, commit: &str, file: &Remote, part: &mut File, path: &Path) -> Result<Result<(), ureq::Error>> {
        let (name, size) = (&file.rfilename, file.size);
        let fail = |e| on_disk(path, e);
        let mut done = part.metadata().map_err(fail)?.len();
        if done == size {
            return Ok(Ok(()));
        }
        let url = format!("{}/resolve/{commit}/{}", self.page, encode(name, "/"));
        let range = format!("bytes={}-", if done < size { done } else { 0 });
        let answer = match self.get(&url).header("Range", range).call() {
            Ok(answer) => answer,
            Err(error) => return Ok(Err(error)),
        };
        let range = answer.headers().get("Content-Range").and_then(|range| range.to_str().ok()).unwrap_or_default();
        if !range.starts_with(&format!("bytes {done}-")) {
            part.set_len(0).map_err(fail)?; // it comes from the start
            done = 0;
        }

        let what = format!("{}: {name}", self.id);
        let style = ProgressStyle::with_template(BAR).expect("a fixed template");
        let bar = ProgressBar::new(size).with_style(style).with_message(what.clone()).with_position(done);
        bar.reset_eta();
        if bar.is_hidden() {
            eprintln!("{what}: downloading {}", DecimalBytes(size - done));
        }
        let mut line = Instant::now();
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) if done == size => break,
                Ok(0) => return Ok(Err(io::Error::from(ErrorKind::UnexpectedEof).into())),
                Ok(n) => n,
                Err(error) => return Ok(Err(error.into())),
            };
            done += n as u64;
            if done > size {
                part.set_len(0).map_err(fail)?;
                return Err(self.nonsense(&format!("more of {name} than its {size} bytes")));
            }
            part.write_all(&buffer[..n]).map_err(fail)?;
            bar.set_position(done);
            if bar.is_hidden() && line.elapsed() > Duration::from_secs(10) {
                line = Instant::now();
                eprintln!("{what}: {} of {}", DecimalBytes(done), DecimalBytes(size));
            }
        }
        bar.finish_and_clear();
        Ok(Ok(()))
    }

    /// What a failure of the network means, and what to do about it.
    fn explain(&self, error: ureq::Error) -> Error {
        let (id, page) = (self.id, &self.page);
        let fail = |cause: String, action: &str| Error::new(Kind::Io, cause).action(action);
        match error {
            ureq::Error::StatusCode(code @ (401 | 403)) => fail(
                format!("{id} is gated or private, or does not exist, or the token is not valid (status {code})"),
                &format!("check the name; accept the licence at {page} and set HF_TOKEN to a token of that account"),
            ),
            ureq::Error::StatusCode(404) => Error::new(Kind::Argument, format!("the hub has no {id}"))
                .action(format!("check the name and the revision (a branch, a tag or a whole commit), see {page}")),
            error => fail(
                format!("{page}: {error}"),
                "check the network, HTTPS_PROXY and HF_ENDPOINT, or try again later: what is here already is not \
                 downloaded again",
            ),
        }
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::new(Kind::Format, format!("{} answers with {what}", self.page))
            .action("check HF_ENDPOINT; what it names does not act as the Hugging Face hub does")
    }
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

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// A part of a URL.
fn encode(text: &str, keep: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b) || keep.as_bytes().contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

/// Whether it may go well another time.
fn is_passing(error: &ureq::Error) -> bool {
    !matches!(error, ureq::Error::StatusCode(code) if *code < 500 && *code != 429)
}

/// An error of the file system that the cache is on.
fn on_disk(path: &Path, error: io::Error) -> Error {
    Error::new(Kind::Io, error.to_string())
        .at(path)
        .action("free some space, or set HF_HUB_CACHE to a folder that can be written")
}

/// Lets a file of a commit be found.
fn link(blob: &Path, place: &Path) -> io::Result<()> {
    let folder = place.parent().unwrap_or(place);
    fs::create_dir_all(folder)?;
    let _ = fs::remove_file(place); // it leads nowhere
    #[cfg(unix)]
    return std::os::unix::fs::symlink(blob, place);
    #[cfg(not(unix))] // symbolic links need privileges there
    return fs::hard_link(folder.join(blob), place);
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
        /// Sends more than there is.
        longer: bool,
        /// What is said to be the name of every blob.
        blob: Option<String>,
        silent_api: bool,
        /// Falls silent amid a transfer.
        silent: bool,
        /// Where large files are.
        store: String,
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
            let url = format!("http://{}", listener.local_addr().unwrap());
            let rules = Rules { commit: COMMIT.into(), files, store: url.clone(), ..Rules::default() };
            let server = TestServer { url, rules: Arc::new(Mutex::new(rules)), log: Arc::default() };
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

        /// The ranges of weights that were asked for since the last call.
        fn transfers(&self) -> Vec<String> {
            let ranges = |r: String| Some(r.strip_prefix("/cdn/")?.split(' ').nth(1)?.to_string());
            self.requests().into_iter().filter_map(ranges).collect()
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
        let blob = |content: &[u8]| {
            let digits = format!("{}{}", content.len(), content[0]);
            rules.blob.clone().unwrap_or(format!("{digits:0>64}"))
        };
        let (name, at_store) = match (path.strip_prefix("/cdn/"), path.strip_prefix("/org/name/resolve/")) {
            (Some(name), _) => (name, true),
            (_, Some(rest)) => (rest.strip_prefix(&format!("{}/", rules.commit)).unwrap(), false),
            _ if rules.silent_api => {
                drop(rules);
                return thread::sleep(Duration::from_secs(3));
            }
            _ => {
                let question = path.strip_prefix("/api/models/org/name/revision/");
                let revision = question.and_then(|question| question.strip_suffix("?blobs=true"));
                if !revision.is_some_and(|revision| revision == "main" || revision == rules.commit) {
                    return refuse(&mut stream, 404);
                }
                if let Some(status) = rules.api {
                    return refuse(&mut stream, status);
                }
                let describe = |(name, content): (&String, &Vec<u8>)| match is_large(name) {
                    true => json!({"rfilename": name, "size": content.len(), "lfs": {"sha256": blob(content)}}),
                    false => {
                        json!({"rfilename": name, "size": content.len(), "blobId": blob(content).split_off(if rules.blob.is_some() { 0 } else { 24 })})
                    }
                };
                let files: Vec<_> = rules.files.iter().map(describe).collect();
                let text = json!({"sha": rules.commit, "siblings": files}).to_string();
                return send(&mut stream, 200, &format!("Content-Length: {}\r\n", text.len()), text.as_bytes());
            }
        };
        assert_eq!(header("accept-encoding:"), "identity", "otherwise CloudFront ignores ranges");
        let mut content = rules.files[name].clone();
        if let Some(status) = rules.resolve {
            return refuse(&mut stream, status);
        }
        if is_large(name) && !at_store {
            let location = format!("Location: {}/cdn/{name}\r\n", rules.store);
            return send(&mut stream, 302, &(location + "Content-Length: 0\r\n"), &[]);
        }
        let size = content.len();
        content.resize(size + usize::from(rules.longer), 0);
        let range = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        let (status, first) = match range.filter(|_| !rules.ignores_ranges) {
            Some(first) => (206, first.parse().unwrap()),
            None => (200, 0),
        };
        let body = &content[first..];
        let mut headers = String::new();
        if status == 206 {
            headers += &format!("Content-Range: bytes {first}-{}/{size}\r\n", size - 1);
        }
        if !rules.no_length {
            headers += &format!("Content-Length: {}\r\n", body.len());
        }
        let silent = rules.silent && at_store;
        let cut = if at_store { rules.cuts.pop_front() } else { None };
        drop(rules);
        send(&mut stream, status, &headers, &body[..cut.unwrap_or(if silent { 1000 } else { body.len() })]);
        if silent {
            thread::sleep(Duration::from_secs(3));
        }
    }

    fn is_large(name: &str) -> bool {
        name.ends_with(".safetensors")
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
            (r#"{"weight_map": {"a": "absent"}}"#, Kind::Format, "answers with no absent, which its index names"),
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
        client.fails(
            "org/name",
            Kind::Io,
            &["(while downloading model.safetensors)", "try again later: what is here already is not"],
        );
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
        for (left, ignores_ranges, asked) in [
            (200_000, false, vec!["bytes=0-"]),
            (100_000, false, vec![]),
            (99_999, false, vec!["bytes=99999-"]),
            (99_999, true, vec!["bytes=99999-"]),
        ] {
            let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &weights)]);
            let client = Client::of(&server.url);
            server.rules().ignores_ranges = ignores_ranges;
            let blobs = client.repo().join("blobs");
            fs::create_dir_all(&blobs).unwrap();
            fs::write(blobs.join(format!("{:0>64}.mindskip", "1000000")), noise(left)).unwrap();
            let dir = client.fetch("org/name").unwrap();
            assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), weights, "{left}");
            assert_eq!(server.transfers(), asked, "{left}");
            assert!(names_in(&blobs).iter().all(|name| !name.ends_with(".mindskip")));
        }
    }

    #[test]
    fn a_file_of_another_length_is_not_used() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let client = Client::of(&server.url);
        server.rules().no_length = true;
        server.rules().cuts.push_back(999);
        client.fails("org/name", Kind::Io, &["unexpected end of file (while downloading model.safetensors)"]);
        assert!(!names_in(&client.repo().join("snapshots").join(COMMIT)).contains(WEIGHTS));
        server.rules().longer = true;
        client.fails("org/name", Kind::Format, &["answers with more of model.safetensors than its 1000 bytes; "]);
        assert!(!names_in(&client.repo().join("snapshots").join(COMMIT)).contains(WEIGHTS));
        server.rules().longer = false;
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
        client.fails("org/name", Kind::Io, &["/org/name: http status: 503; ", "try again later"]);
        server.rules().api = None;
        client.hub.endpoint = "huggingface".into();
        client.fails("org/name", Kind::Io, &["huggingface/org/name: ", "HF_ENDPOINT"]);
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
        let parts = ["http://127.0.0.1:1/org/name: io: Connection refused", "; check the network, HTTPS"];
        client.fails("org/name", Kind::Io, &parts);
    }

    #[test]
    fn a_silent_server_is_left() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(100_000))]);
        let mut client = Client::of(&server.url);
        client.hub.patience = Duration::from_millis(1500);
        server.rules().silent = true;
        client.fails("org/name", Kind::Io, &["/org/name: ", "timeout", "; check the network"]);
    }

    #[test]
    fn hostile_servers_do_no_harm() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let client = Client::of(&server.url);
        let evil = client.dir.path().join("evil");
        for blob in [evil.to_str().unwrap(), "../../../../../../../../../../../../../evil", "a long name, but no hash"]
        {
            server.rules().blob = Some(blob.into());
            client.fails("org/name", Kind::Format, &["answers with no content of config.json; check HF_ENDPOINT"]);
        }
        server.rules().blob = None;
        server.rules().commit = "../../../../x".into();
        client.fails("org/name", Kind::Format, &["answers with no commit; check HF_ENDPOINT"]);
        assert_eq!(fs::read_dir(client.dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_token_stays_with_the_hub() {
        let files = [CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000)[..])];
        let (server, store) = (TestServer::start(&files), TestServer::start(&files));
        server.rules().store = store.url.replace("127.0.0.1", "localhost"); // the port makes no difference to ureq
        Client::of(&server.url).fetch("org/name").unwrap();
        assert_eq!(store.requests(), ["/cdn/model.safetensors bytes=0- "]);
        assert!(server.requests().iter().all(|r| r.ends_with("Bearer hf_secret")));
    }

    #[test]
    fn two_at_a_time_download_once() {
        let weights = noise(100_000);
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &weights)]);
        let client = Client::of(&server.url);
        let blob = client.repo().join("blobs").join(format!("{:0>64}", "1000000"));
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        let mut part = File::create(blob.with_extension("mindskip")).unwrap();
        part.lock().unwrap();
        thread::scope(|scope| {
            let other = scope.spawn(|| client.fetch("org/name").unwrap());
            while !client.repo().join("snapshots").join(COMMIT).join(TOKENIZER).exists() {
                thread::sleep(Duration::from_millis(10));
            }
            thread::sleep(Duration::from_millis(100));
            part.write_all(&weights).unwrap();
            fs::rename(blob.with_extension("mindskip"), &blob).unwrap();
            drop(part);
            assert_eq!(fs::read(other.join().unwrap().join(WEIGHTS)).unwrap(), weights);
        });
        assert_eq!(server.transfers(), [""; 0]);
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_told_apart() {
        let server = TestServer::start(&[CONFIG_FILE, TOKENIZER_FILE, (WEIGHTS, &noise(1000))]);
        let mut client = Client::of(&server.url);
        client.hub.cache = client.dir.path().join("file");
        fs::write(&client.hub.cache, "").unwrap();
        client.fails(
            "org/name",
            Kind::Io,
            &["/file/models--org--name/blobs/", ": Not a directory", "; free some space, or set HF_HUB_CACHE"],
        );
    }
}
