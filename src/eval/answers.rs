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
