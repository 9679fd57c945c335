//! Against a server of our own on 127.0.0.1.

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
    for blob in [evil.to_str().unwrap(), "../../../../../../../../../../../../../evil", "a long name, but no hash"] {
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
