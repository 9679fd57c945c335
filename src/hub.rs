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
///
/// ```no_run
/// use mindskip::bundle::Bundle;
/// use mindskip::hub::Hub;
///
/// let folder = Hub::from_env().fetch(&"HuggingFaceTB/SmolLM2-135M-Instruct".parse()?)?;
/// assert_eq!(Bundle::open(&folder)?.config.layers, 30);
/// # Ok::<(), mindskip::Error>(())
/// ```
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
            .https_only(self.endpoint.starts_with("https:")) // nor do redirects lead away from it
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
mod tests;
