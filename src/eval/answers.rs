//! Log-likelihoods that were found before, kept so that long work can go on where it was broken off.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::request::Encoded;
use crate::engine::Engine;
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::model::{Gates, Routing};
use crate::step::Activity;

/// What answers rest on: the same of everything gives the same log-likelihoods.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Engine, Options};
/// use mindskip::eval::Basis;
/// use mindskip::model::Routing;
///
/// let bundle = Bundle::embedded()?;
/// let (model, routing) = (bundle.weights.fingerprint(), bundle.routers.map(Routing::routers));
/// let mut engine = Engine::new(bundle.config, bundle.weights, routing.clone(), &Options::default())?;
/// let routed = Basis::new(&engine, &model, "piqa", &[]);
/// engine.reroute(None)?;
/// assert_ne!(Basis::new(&engine, &model, "piqa", &[]), routed);
/// engine.reroute(routing)?;
/// assert_eq!(Basis::new(&engine, &model, "piqa", &[]), routed);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    format: String,
    /// The model's fingerprint.
    model: String,
    /// Of the routers, or `dense`.
    routing: String,
    task: String,
    /// Of the tokens of all requests, and of which of them are context.
    requests: String,
    device: String,
    /// Of weights that are not read as they are stored, activations and K/V.
    dtypes: String,
}

/// What was found for a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answers {
    pub of: Basis,
    /// By record and choice.
    pub loglikelihoods: Vec<Vec<f64>>,
    pub activity: Activity,
}

/// A file of [`Answers`], a line each.
///
/// ```
/// use mindskip::bundle::Bundle;
/// use mindskip::engine::{Activity, Engine, Options};
/// use mindskip::eval::{AnswerFile, Answers, Basis, Request};
///
/// let bundle = Bundle::embedded()?;
/// let (tokenizer, model) = (bundle.tokenizer()?, bundle.weights.fingerprint());
/// let request = Request { context: "Tom had a red".into(), continuation: " ball".into() };
/// let requests = [(String::new(), vec![request.encode(&tokenizer, 512)?])];
/// let engine = Engine::new(bundle.config, bundle.weights, None, &Options::default())?;
/// let basis = Basis::new(&engine, &model, "balls", &requests);
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("answers.jsonl");
/// let mut file = AnswerFile::open(&path)?;
/// assert!(file.get(&basis, &requests, 8).is_none());
/// let activity = Activity { tokens: 5, active: vec![5; 8] };
/// file.add(Answers { of: basis.clone(), loglikelihoods: vec![vec![-1.5]], activity })?;
/// let again = AnswerFile::open(&path)?;
/// assert_eq!(again.get(&basis, &requests, 8).map(|found| found.loglikelihoods[0][0]), Some(-1.5));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct AnswerFile {
    path: PathBuf,
    all: Vec<Answers>,
}

const FORMAT: &str = "mindskip-answers-1";

impl Basis {
    /// Of a task's requests, as [`Work::new`](super::Work::new) takes them, to an engine as it is routed. `model` is its
    /// [`fingerprint`](crate::weights::Weights::fingerprint).
    pub fn new(engine: &Engine, model: &str, task: &str, requests: &[(String, Vec<Encoded>)]) -> Basis {
        let mut bytes = Vec::new();
        for (_, choices) in requests {
            bytes.extend((choices.len() as u64).to_le_bytes());
            for Encoded { ids, context, .. } in choices {
                bytes.extend([ids.len() as u64, *context as u64].map(u64::to_le_bytes).as_flattened());
                bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
            }
        }
        let info = engine.device();
        Basis {
            format: FORMAT.into(),
            model: model.into(),
            routing: match engine.routing() {
                Some(Routing { gates: Gates::Routers(set), .. }) => files::digest(&set.to_bytes()),
                Some(random) => format!("{random:?}"),
                None => "dense".into(),
            },
            task: task.into(),
            requests: files::digest(&bytes),
            device: info.name.clone(),
            dtypes: format!("{:?}, {}, {}", info.weights, info.activations, info.kv),
        }
    }
}

impl AnswerFile {
    /// Reads what is there; nothing when there is no file. Errors: Io; Format when it is none of these.
    pub fn open(path: &Path) -> Result<AnswerFile> {
        let bytes = files::read_if_exists(path)?.unwrap_or_default();
        let all = serde_json::Deserializer::from_slice(&bytes).into_iter().collect::<Result<_, _>>().map_err(|e| {
            Error::new(Kind::Format, format!("not a file of answers: {e}"))
                .at(path)
                .action("name another file, or delete it to begin anew")
        })?;
        Ok(AnswerFile { path: path.into(), all })
    }

    /// What was found on this basis for these requests to a model of so many layers; None when nothing was, or nothing that
    /// can be used.
    pub fn get(&self, of: &Basis, requests: &[(String, Vec<Encoded>)], layers: usize) -> Option<&Answers> {
        let fits = |found: &Vec<f64>, choices: usize| found.len() == choices && found.iter().all(|x| x.is_finite());
        self.all.iter().find(|answers| {
            answers.of == *of
                && answers.activity.active.len() == layers
                && answers.loglikelihoods.len() == requests.len()
                && answers.loglikelihoods.iter().zip(requests).all(|(found, (_, choices))| fits(found, choices.len()))
        })
    }

    /// Adds to the file. Errors: Io.
    pub fn add(&mut self, answers: Answers) -> Result<()> {
        self.all.push(answers);
        files::write_atomically(&self.path, |out| {
            self.all.iter().try_for_each(|answers| {
                serde_json::to_writer(&mut *out, answers)?;
                writeln!(out)
            })
        })
    }
}
