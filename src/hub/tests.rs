//! Downloads from a server that this file starts: a repository of a few files, and ways to misbehave.

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::cache::{git_id, hex, on_disk, pointer_id};
use super::*;
use crate::bundle::Bundle;

const COMMIT: &str = "0123456789012345678901234567890123456789";

/// How the server behaves.
#[derive(Default)]
struct Rules {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Status, error code and message for questions about the repository.
    api: Option<(u16, &'static str, &'static str)>,
    /// The same for its files.
    resolve: Option<(u16, &'static str, &'static str)>,
    /// After how many bytes the next transfers of weights break off.
    cuts: VecDeque<usize>,
    ignores_ranges: bool,
    no_length: bool,
    /// Sends something else.
    damages: bool,
    silent: bool,
    /// Where weights are; empty: here.
    store: String,
}

struct TestServer {
    url: String,
    rules: Arc<Mutex<Rules>>,
    /// Method, path, range and token of every request.
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

    fn transfers(&self) -> Vec<String> {
        self.requests().into_iter().filter(|r| r.starts_with("GET /cdn/")).collect()
    }
}

fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn answer(mut stream: TcpStream, rules: &Mutex<Rules>, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line.trim().is_empty() {
            break;
        }
        head.push(line.trim().to_string());
    }
    let Some(request) = head.first() else { return };
    let header = |name: &str| head.iter().find_map(|h| h.strip_prefix(name)).unwrap_or_default().trim();
    let mut parts = request.split(' ');
    let (method, path) = (parts.next().unwrap(), parts.next().unwrap());
    let mut body = vec![0; header("content-length:").parse().unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    let entry = format!("{method} {path} {} {}", header("range:"), header("authorization:"));
    log.lock().unwrap().push(entry.trim_end().to_string());

    let mut rules = rules.lock().unwrap();
    let silent = rules.silent && path.starts_with("/cdn/");
    let send = |stream: &mut TcpStream, status: u16, headers: &str, body: &[u8], cut: usize| {
        let head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{headers}\r\n");
        let body = if method == "HEAD" { &[] } else { &body[..body.len().min(cut)] };
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
    };
    let length = |n: usize| format!("Content-Length: {n}\r\n");
    let refuse = |stream: &mut TcpStream, (status, code, message): (u16, &str, &str)| {
        let headers = format!("X-Error-Code: {code}\r\nX-Error-Message: {message}\r\nContent-Length: 0\r\n");
        send(stream, status, &headers, &[], 0);
    };
    let reply = |stream: &mut TcpStream, value: serde_json::Value| {
        let text = value.to_string();
        send(stream, 200, &length(text.len()), text.as_bytes(), usize::MAX);
    };
    let describe = |name: &str, content: &[u8]| {
        let sha256 = hex(&Sha256::digest(content));
        let mut entry = json!({"type": "file", "path": name, "size": content.len(), "oid": git_id(content)});
        if is_large(name) {
            entry["oid"] = pointer_id(&sha256, content.len() as u64).into();
            entry["lfs"] = json!({"oid": sha256, "size": content.len(), "pointerSize": 130});
        }
        entry
    };

    if let Some(rest) = path.strip_prefix("/api/models/org/name/") {
        if let Some(refusal) = rules.api {
            return refuse(&mut stream, refusal);
        }
        let at = |place: &str| rest.strip_prefix(place).is_some_and(|rev| rev == "main" || rev == rules.commit);
        if at("revision/") {
            let names: Vec<_> = rules.files.keys().map(|name| json!({"rfilename": name})).collect();
            reply(&mut stream, json!({"id": "org/name", "sha": rules.commit, "siblings": names}));
        } else if at("paths-info/") {
            let asked: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let asked = asked["paths"].as_array().unwrap().iter().filter_map(|p| p.as_str());
            let entries = asked.filter_map(|name| rules.files.get(name).map(|content| describe(name, content)));
            reply(&mut stream, entries.collect());
        } else {
            refuse(&mut stream, (404, "RevisionNotFound", "Invalid rev id"));
        }
    } else if let Some(name) = path.strip_prefix(&format!("/org/name/resolve/{}/", rules.commit)) {
        let Some(content) = rules.files.get(name) else {
            return refuse(&mut stream, (404, "EntryNotFound", "Entry not found"));
        };
        if let Some(refusal) = rules.resolve {
            return refuse(&mut stream, refusal);
        }
        match is_large(name) {
            true => send(
                &mut stream,
                302,
                &format!("Location: {}/cdn/{name}\r\nContent-Length: 0\r\n", rules.store),
                &[],
                0,
            ),
            false => send(&mut stream, 200, &length(content.len()), content, usize::MAX),
        }
    } else if let Some(name) = path.strip_prefix("/cdn/") {
        let mut content = rules.files[name].clone();
        if rules.damages {
            content.reverse();
        }
        let cut = match method {
            "GET" => rules.cuts.pop_front().unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        let range = header("range:").strip_prefix("bytes=").and_then(|range| range.split_once('-'));
        let (status, first) = match range.filter(|_| !rules.ignores_ranges) {
            Some((first, last)) => {
                assert_eq!(last.parse::<usize>().unwrap(), content.len() - 1);
                (206, first.parse().unwrap())
            }
            None => (200, 0),
        };
        let headers = if rules.no_length { String::new() } else { length(content.len() - first) };
        drop(rules);
        if silent && method == "GET" {
            send(&mut stream, status, &headers, &content[first..], 1000);
            thread::sleep(Duration::from_secs(3));
        } else {
            send(&mut stream, status, &headers, &content[first..], cut);
        }
    } else {
        refuse(&mut stream, (404, "RepoNotFound", "Repository not found"));
    }
}

/// A hub that uses a server and a new cache, and what it reports.
struct Client {
    hub: Hub,
    lines: Arc<Mutex<Vec<String>>>,
    dir: TempDir,
}

impl Client {
    fn of(url: &str) -> Client {
        let dir = tempfile::tempdir().unwrap();
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let sink = lines.clone();
        let hub = Hub {
            endpoint: Some(url.into()),
            cache: Some(dir.path().into()),
            token: Some("hf_secret".into()),
            offline: false,
            retries: 1,
            patience: Duration::from_secs(20),
            report: Report::Lines(Box::new(move |line| sink.lock().unwrap().push(line.into()))),
        };
        Client { hub, lines, dir }
    }

    fn fetch(&self, id: &str) -> Result<PathBuf> {
        self.hub.fetch(&id.parse().unwrap())
    }

    fn fails(&self, id: &str) -> Error {
        self.fetch(id).unwrap_err()
    }

    fn lines(&self) -> Vec<String> {
        std::mem::take(&mut *self.lines.lock().unwrap())
    }

    fn repo(&self) -> PathBuf {
        self.dir.path().join("models--org--name")
    }

    fn blobs(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.repo().join("blobs")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// Bytes that no part of repeats.
fn noise(len: u32) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

const CONFIG: (&str, &[u8]) = ("config.json", b"{}");
const TOKENIZER: (&str, &[u8]) = ("tokenizer.json", b"{\"a\": 1}");

/// Nothing listens there.
const NOWHERE: &str = "http://127.0.0.1:1";

#[test]
fn a_model_is_downloaded_as_the_cache_lays_it_out_and_runs() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories");
    let read = |name: &str| fs::read(assets.join(name)).unwrap();
    let names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS];
    let contents = names.map(read);
    let mut files: Vec<(&str, &[u8])> = names.iter().copied().zip(contents.iter().map(Vec::as_slice)).collect();
    files.push(("README.md", b"hello"));
    files.push(("pytorch_model.bin", b"hello"));
    let server = TestServer::start(&files);
    let client = Client::of(&server.url);

    let dir = client.fetch("org/name").unwrap();
    assert_eq!(dir, client.repo().join("snapshots").join(COMMIT));
    let bundle = Bundle::open(&dir).unwrap();
    assert_eq!(bundle.weights.fingerprint(), Bundle::embedded().unwrap().weights.fingerprint());
    let found: BTreeSet<_> =
        fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, names.map(String::from).into());
    let expected = names.iter().zip(&contents).map(|(name, content)| match is_large(name) {
        true => hex(&Sha256::digest(content)),
        false => git_id(content),
    });
    assert_eq!(client.blobs(), expected.collect());
    #[cfg(unix)]
    assert!(fs::read_link(dir.join(WEIGHTS)).unwrap().starts_with("../../blobs"));
    assert_eq!(fs::read_to_string(client.repo().join("refs/main")).unwrap(), COMMIT);
    let absent = client.repo().join(".no_exist").join(COMMIT);
    assert_eq!(fs::read_dir(absent).unwrap().count(), 1, "chat_template.jinja");

    let requests = server.requests();
    assert!(requests.iter().all(|r| r.ends_with("Bearer hf_secret")), "{requests:#?}");
    assert!(!requests.iter().any(|r| r.contains("README") || r.contains("pytorch")), "{requests:#?}");
    let lines = client.lines();
    assert_eq!(lines[0], "org/name: downloading 5 files, 3.45 MB");
    assert!(lines.iter().any(|l| l.contains("% (") && l.ends_with(" of 3.45 MB)")), "{lines:#?}");
    assert!(lines.last().unwrap().starts_with("org/name: downloaded in "), "{lines:#?}");

    assert_eq!(client.fetch("org/name").unwrap(), dir);
    assert_eq!(server.requests().len(), 1, "whether main has moved is asked, no more");
    assert_eq!(client.fetch(&format!("org/name@{COMMIT}")).unwrap(), dir);
    assert_eq!(server.requests(), [""; 0], "a commit does not move");
    assert_eq!(client.lines(), [""; 0]);
}

#[test]
fn broken_transfers_go_on_where_they_stopped() {
    let weights = noise(100_000);
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &weights)]);
    let client = Client::of(&server.url);
    server.rules().cuts.extend([30_000, 25_000, 0]);
    let dir = client.fetch("org/name").unwrap();
    assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), weights);
    let transfers = server.transfers();
    assert_eq!(transfers.len(), 4, "{transfers:#?}");
    assert_eq!(transfers[0], "GET /cdn/model.safetensors  Bearer hf_secret");
    for (transfer, from) in transfers[1..].iter().zip([30_000, 55_000, 55_000]) {
        assert_eq!(*transfer, format!("GET /cdn/model.safetensors bytes={from}-99999 Bearer hf_secret"));
    }
}

#[test]
fn another_run_goes_on_where_the_last_one_stopped() {
    let weights = noise(100_000);
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &weights)]);
    let mut client = Client::of(&server.url);
    client.hub.retries = 0;
    server.rules().cuts.push_back(40_000);
    let error = client.fails("org/name");
    assert_eq!(error.kind(), Kind::Io);
    assert!(error.to_string().ends_with("; try again later: what is here already is not downloaded again"), "{error}");
    assert!(!client.repo().join("refs/main").exists(), "what is not complete is not what main stands for");
    server.requests();
    client.lines();

    let dir = client.fetch("org/name").unwrap();
    assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), weights);
    assert_eq!(server.transfers(), ["GET /cdn/model.safetensors bytes=40000-99999 Bearer hf_secret"]);
    assert_eq!(client.lines()[1], "org/name: 40.00 kB are here already, going on");
    assert!(!client.blobs().iter().any(|name| name.ends_with(".incomplete")));
}

#[test]
fn what_was_left_behind_is_not_trusted() {
    let weights = noise(100_000);
    for (left, ignores_ranges, no_length) in [
        (noise(50)[10..].to_vec(), false, false),
        (noise(200_000), false, false),
        (noise(40_000), true, false),
        (noise(40_000), true, true),
    ] {
        let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &weights)]);
        let client = Client::of(&server.url);
        server.rules().ignores_ranges = ignores_ranges;
        server.rules().no_length = no_length;
        let git_id = pointer_id(&hex(&Sha256::digest(&weights)), 100_000);
        let blobs = client.repo().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{git_id}.incomplete")), &left).unwrap();
        let dir = client.fetch("org/name").unwrap();
        assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), weights, "{ignores_ranges} {no_length}");
    }
}

#[test]
fn damaged_files_are_refused() {
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &noise(1000))]);
    let client = Client::of(&server.url);
    server.rules().damages = true;
    let error = client.fails("org/name");
    assert_eq!(error.kind(), Kind::Format);
    assert!(error.to_string().contains("model.safetensors arrives damaged"), "{error}");
    assert_eq!(server.transfers().len(), 1);
    assert!(!client.repo().join("snapshots").join(COMMIT).join(WEIGHTS).exists());
    server.rules().damages = false;
    client.fetch("org/name").unwrap();
}

#[test]
fn a_silent_server_is_left() {
    let weights = noise(100_000);
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &weights)]);
    let mut client = Client::of(&server.url);
    client.hub.patience = Duration::from_millis(300);
    client.hub.retries = 0;
    server.rules().silent = true;
    let start = Instant::now();
    let error = client.fails("org/name");
    assert!(error.to_string().contains("says nothing for 300ms; try again"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn refusals_say_what_to_do() {
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &noise(1000))]);
    let mut client = Client::of(&server.url);
    client.hub.retries = 0;
    let page = format!("{}/org/name", server.url);
    let check = |error: Error, kind: Kind, parts: &[&str]| {
        assert_eq!(error.kind(), kind, "{error}");
        for part in parts {
            assert!(error.to_string().contains(part), "{part:?} in {error}");
        }
    };
    check(client.fails("org/other"), Kind::Argument, &["there is no model org/other; check the name"]);
    check(
        client.fails("org/name@v9"),
        Kind::Argument,
        &["org/name has no revision v9; give a branch", "/org/name/commits"],
    );

    let accept = format!("; accept the licence at {page}, then set HF_TOKEN");
    server.rules().resolve = Some((403, "GatedRepo", "Access is restricted."));
    check(client.fails("org/name"), Kind::Io, &["org/name is gated", "(Access is restricted.)", &accept]);
    server.rules().resolve = Some((401, "GatedRepo", "Please log in."));
    check(client.fails("org/name"), Kind::Io, &["org/name is gated", &accept]);
    server.rules().resolve = None;
    server.rules().api = Some((401, "", "Invalid credentials in Authorization header"));
    check(client.fails("org/name"), Kind::Io, &["token is not valid (Invalid credentials", "HF_TOKEN", &page]);
    server.rules().api = Some((403, "", "no"));
    check(client.fails("org/name"), Kind::Io, &["not for everyone (no); set HF_TOKEN", &page]);
    server.rules().api = Some((429, "", "slow down"));
    check(client.fails("org/name"), Kind::Io, &["refuses more requests for now (slow down); wait"]);
    server.rules().api = Some((503, "", ""));
    check(client.fails("org/name"), Kind::Io, &["fails with status 503", "try again later"]);
    server.rules().api = None;

    server.rules().commit = "../../../../x".into();
    check(client.fails("org/name"), Kind::Format, &["answers with no commit; check HF_ENDPOINT"]);
    client.hub.endpoint = Some("huggingface".into());
    check(client.fails("org/name"), Kind::Argument, &["check HF_ENDPOINT"]);
}

#[test]
fn repositories_without_a_model_that_runs_are_refused() {
    for (files, message) in [
        (&[("model.Q4.gguf", &b"x"[..])][..], "org/name has no config.json; it has GGUF files"),
        (&[CONFIG, ("pytorch_model.bin", b"x")], "org/name has no safetensors weights; give a model in the format"),
    ] {
        let server = TestServer::start(files);
        let error = Client::of(&server.url).fails("org/name");
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(server.transfers(), [""; 0]);
    }
}

#[test]
fn offline_only_the_cache_is_asked() {
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &noise(1000))]);
    let mut client = Client::of(&server.url);
    client.hub.offline = true;
    let error = client.fails("org/name").to_string();
    assert!(error.contains("missing: all of it; run it once without HF_HUB_OFFLINE"), "{error}");
    assert!(error.starts_with(&format!("{}: org/name is not complete", client.dir.path().display())), "{error}");

    client.hub.offline = false;
    let dir = client.fetch("org/name").unwrap();
    server.requests();
    client.hub.offline = true;
    assert_eq!(client.fetch("org/name").unwrap(), dir);
    assert_eq!(client.fetch(&format!("org/name@{COMMIT}")).unwrap(), dir);
    assert!(client.fails("org/name@v1").to_string().contains("missing: all of it"));
    for name in [TOKENIZER.0, WEIGHTS] {
        fs::remove_file(dir.join(name)).unwrap();
    }
    let error = client.fails("org/name").to_string();
    assert!(error.contains("missing: model.safetensors, tokenizer.json; "), "{error}");
    assert_eq!(server.requests(), [""; 0]);
    assert!(["1", "ON", "true", "Yes"].into_iter().all(is_on) && !["0", "", "no"].into_iter().any(is_on));
}

#[test]
fn without_a_network_the_cache_will_do() {
    let server = TestServer::start(&[CONFIG, (WEIGHTS, &noise(1000))]);
    let mut client = Client::of(&server.url);
    client.hub.retries = 0;
    let dir = client.fetch("org/name").unwrap();
    client.lines();
    client.hub.endpoint = Some(NOWHERE.into());
    assert_eq!(client.fetch("org/name").unwrap(), dir, "that there is no tokenizer is known");
    let lines = client.lines();
    assert!(
        lines.len() == 1
            && lines[0].contains("cannot be reached: ")
            && lines[0].ends_with("; using what is in the cache"),
        "{lines:?}"
    );

    fs::remove_file(dir.join(WEIGHTS)).unwrap();
    let error = client.fails("org/name");
    assert!(error.to_string().contains("cannot be reached: Connection refused"), "{error}");
    assert!(error.to_string().ends_with("; check the network, HTTPS_PROXY and HF_ENDPOINT"), "{error}");
}

#[test]
fn shards_are_those_of_the_index() {
    let index =
        br#"{"weight_map": {"a": "model-1.safetensors", "b": "sub/model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let shards = [noise(5000), noise(7000)];
    let files: [(&str, &[u8]); 6] = [
        CONFIG,
        TOKENIZER,
        (INDEX, index),
        ("model-1.safetensors", &shards[0]),
        ("sub/model-2.safetensors", &shards[1]),
        ("other.safetensors", b"x"),
    ];
    let server = TestServer::start(&files);
    let mut client = Client::of(&server.url);
    let dir = client.fetch("org/name").unwrap();
    assert_eq!(fs::read(dir.join("model-1.safetensors")).unwrap(), shards[0]);
    assert_eq!(fs::read(dir.join("sub/model-2.safetensors")).unwrap(), shards[1]);
    assert_eq!(server.transfers().len(), 2);
    assert_eq!(client.lines()[0], "org/name: downloading 4 files, 12.01 kB");

    client.hub.offline = true;
    assert_eq!(client.fetch("org/name").unwrap(), dir);
    fs::remove_file(dir.join("sub/model-2.safetensors")).unwrap();
    assert!(client.fails("org/name").to_string().contains("missing: sub/model-2.safetensors; "));

    for bad in [
        r#"{"weight_map": {"a": "../../../../evil"}}"#,
        r#"{"weight_map": {"a": "/evil"}}"#,
        "[]",
        r#"{"weight_map": {"a": ""}}"#,
    ] {
        let server = TestServer::start(&[CONFIG, TOKENIZER, (INDEX, bad.as_bytes()), ("x.safetensors", b"x")]);
        let error = Client::of(&server.url).fails("org/name");
        assert_eq!(error.kind(), Kind::Format, "{error}");
        assert!(error.path().unwrap().ends_with(INDEX), "{error}");
    }
    let server = TestServer::start(&[CONFIG, TOKENIZER, (INDEX, br#"{"weight_map": {"a": "absent.safetensors"}}"#)]);
    let error = Client::of(&server.url).fails("org/name").to_string();
    assert!(error.contains("answers with nothing about absent.safetensors; "), "{error}");
}

#[test]
fn a_new_commit_costs_what_it_changes() {
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &noise(1000))]);
    let client = Client::of(&server.url);
    let old = client.fetch("org/name").unwrap();
    server.requests();
    let commit = "abcdef".repeat(7)[..40].to_string();
    server.rules().commit = commit.clone();
    server.rules().files.insert("config.json".into(), b"{ }".into());
    let new = client.fetch("org/name").unwrap();
    assert_eq!(new, client.repo().join("snapshots").join(commit));
    assert_eq!(fs::read(new.join("config.json")).unwrap(), b"{ }");
    assert_eq!(fs::read(old.join("config.json")).unwrap(), b"{}");
    assert_eq!(fs::read(new.join(WEIGHTS)).unwrap(), noise(1000));
    let requests = server.requests();
    let gets: Vec<_> = requests.iter().filter(|r| r.starts_with("GET /org")).collect();
    assert!(gets.len() == 1 && gets[0].contains("config.json"), "{requests:#?}");

    let other = noise(1001)[1..].to_vec(); // as large, but not the same
    server.rules().files.insert(WEIGHTS.into(), other.clone());
    server.rules().commit = "f".repeat(40);
    assert_eq!(fs::read(client.fetch("org/name").unwrap().join(WEIGHTS)).unwrap(), other);
}

#[test]
fn two_at_a_time_download_once() {
    let weights = noise(100_000);
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &weights)]);
    let client = Client::of(&server.url);
    let file = Remote {
        name: WEIGHTS.into(),
        size: 100_000,
        git_id: pointer_id(&hex(&Sha256::digest(&weights)), 100_000),
        large: true,
    };
    let id: HubId = "org/name".parse().unwrap();
    let cache = Cache::new(client.dir.path(), &id);
    let lock = cache.lock(&file).unwrap().expect("nobody else has it");
    thread::scope(|scope| {
        let other = scope.spawn(|| client.fetch("org/name").unwrap());
        while !client
            .lines
            .lock()
            .unwrap()
            .iter()
            .any(|l| l == "org/name: waiting for another process that downloads model.safetensors")
        {
            thread::sleep(Duration::from_millis(10));
        }
        let mut partial = cache.open(&file).unwrap();
        assert!(partial.append(&weights).unwrap());
        assert!(partial.finish().unwrap().is_some());
        drop(lock);
        assert_eq!(fs::read(other.join().unwrap().join(WEIGHTS)).unwrap(), weights);
    });
    assert_eq!(server.transfers(), [""; 0]);
}

#[test]
fn the_token_stays_with_the_hub() {
    let files = [CONFIG, TOKENIZER, (WEIGHTS, &noise(1000)[..])];
    let (server, store) = (TestServer::start(&files), TestServer::start(&files));
    server.rules().store = store.url.clone();
    Client::of(&server.url).fetch("org/name").unwrap();
    assert_eq!(store.requests(), ["HEAD /cdn/model.safetensors", "GET /cdn/model.safetensors"]);
    assert!(server.requests().iter().all(|r| r.ends_with("Bearer hf_secret")));
}

#[test]
fn what_went_missing_is_downloaded_again_from_within_a_runtime_too() {
    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &noise(1000))]);
    let client = Client::of(&server.url);
    let dir = client.fetch("org/name").unwrap();
    fs::remove_file(client.repo().join("blobs").join(hex(&Sha256::digest(noise(1000))))).unwrap();
    let _ = fs::metadata(dir.join(WEIGHTS)).map(|_| fs::remove_file(dir.join(WEIGHTS))); // where links are copies
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { client.fetch("org/name") }).unwrap();
    assert_eq!(fs::read(dir.join(WEIGHTS)).unwrap(), noise(1000));
}

#[test]
fn a_full_disk_is_told_apart() {
    let path = Path::new("/cache/blobs/x");
    let full = on_disk(path, std::io::ErrorKind::StorageFull.into()).to_string();
    assert!(full.starts_with("/cache/blobs/x: ") && full.contains("; free some space, or set HF_HUB_CACHE"), "{full}");
    let denied = on_disk(path, std::io::ErrorKind::PermissionDenied.into()).to_string();
    assert!(denied.ends_with("; check the permissions of the file"), "{denied}");

    let server = TestServer::start(&[CONFIG, TOKENIZER, (WEIGHTS, &noise(1000))]);
    let mut client = Client::of(&server.url);
    let file = client.dir.path().join("file");
    fs::write(&file, "").unwrap();
    client.hub.cache = Some(file.clone());
    let error = client.fails("org/name");
    assert!(error.kind() == Kind::Io && error.path().unwrap().starts_with(&file), "{error}");
}

/// By `git hash-object`.
#[test]
fn contents_are_named_as_git_names_them() {
    assert_eq!(git_id(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
    let sha256 = "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707";
    assert_eq!(pointer_id(sha256, 548_105_171), "44b36d6e32d13c8fb28b0feab0ac8bfefa7efeda");
}
