//! What the log-likelihoods of a task come to.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::perplexity::{TextScore, Window};
use super::request::Request;
use super::task::{Ask, Record, Task};
use crate::bench::{Cells, Lines};
use crate::error::Result;
use crate::files;

/// A mean of ones and zeros, and what it may be off by.
///
/// ```
/// use mindskip::eval::Mean;
///
/// let acc = Mean::of(&[true, true, true, false]);
/// assert_eq!((acc.mean, acc.stderr), (0.75, Some(0.25)));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// From 0 to 1.
    pub mean: f64,
    /// The standard error: that of the sample, by the root of its size. None for a single record.
    pub stderr: Option<f64>,
}

/// Which records were answered right.
///
/// ```
/// use mindskip::eval::result::Right;
/// use mindskip::eval::{Ask, Record};
///
/// let ask = Ask::Choices { context: "Tom had a red".into(), choices: vec!["ball".into(), "ball and a kite".into()] };
/// let record = Record { id: None, description: String::new(), ask, gold: 1 };
/// let right = Right::of(&[record], &[vec![-2.0, -3.0]]);
/// assert_eq!((&right.acc, &right.norm), (&vec![false], &Some(vec![true])), "-3 for more characters");
/// assert_eq!((right.clone().main("piqa"), right.main("rte")), (vec![true], vec![false]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Right {
    /// The likeliest choice is right.
    pub acc: Vec<bool>,
    /// The choice that is likeliest by its characters is right. None where the choices are contexts.
    pub norm: Option<Vec<bool>>,
}

/// A task's score.
///
/// ```
/// use mindskip::eval::{Ask, Record, TaskScore};
///
/// let ask = Ask::Choices { context: "Tom had a red".into(), choices: vec!["ball".into(), "ball and a kite".into()] };
/// let record = Record { id: None, description: String::new(), ask, gold: 1 };
/// let score = TaskScore::of("balls", 0, 0, &[record], &[vec![-2.0, -3.0]]);
/// assert_eq!((score.acc.mean, score.acc_norm.map(|norm| norm.mean)), (0.0, Some(1.0)), "-3 for more characters");
/// assert_eq!(score.main(), score.acc, "as the harness knows no norm for this task");
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    pub task: String,
    pub records: usize,
    pub shots: usize,
    /// The likeliest choice is right.
    pub acc: Mean,
    /// The choice that is likeliest by its characters is right. None where the choices are contexts.
    pub acc_norm: Option<Mean>,
    /// Requests whose context was cut on the left to fit.
    pub cut: usize,
}

/// What was asked of the model, and what came of it.
///
/// ```
/// use mindskip::eval::result::Sample;
/// use mindskip::eval::{Ask, Record};
///
/// let ask = Ask::Choices { context: "Tom had a red".into(), choices: vec!["ball".into(), "idea".into()] };
/// let record = Record { id: Some("7".into()), description: String::new(), ask, gold: 0 };
/// let request = &record.requests("")[1];
/// let sample = Sample::choice("balls", &record, 1, request, -4.5);
/// assert!(matches!(&sample, Sample::Choice { gold: false, continuation, .. } if continuation == " idea"));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Sample {
    /// A choice of a question.
    Choice {
        task: String,
        /// The record's.
        id: Option<String>,
        /// From 0.
        choice: usize,
        /// Whether it is the right one.
        gold: bool,
        context: String,
        continuation: String,
        /// Of the continuation, in nats.
        loglikelihood: f64,
    },
    /// A window of a long text.
    Window {
        /// Its name.
        text: String,
        #[serde(flatten)]
        window: Window,
    },
}

impl Sample {
    /// A choice of a record, from 0, as it was asked for.
    pub fn choice(task: &str, record: &Record, choice: usize, request: &Request, loglikelihood: f64) -> Sample {
        let Request { context, continuation } = request.clone();
        let (id, gold) = (record.id.clone(), choice == record.gold);
        Sample::Choice { task: task.into(), id, choice, gold, context, continuation, loglikelihood }
    }
}

/// Writes samples as JSON lines, all or nothing. Errors: Io.
///
/// ```
/// use mindskip::eval::perplexity::Window;
/// use mindskip::eval::result::{Sample, save_samples};
///
/// let window = Window { begin: 0, end: 16, counted: 15, loglikelihood: -31.5 };
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("samples.jsonl");
/// save_samples(&path, &[Sample::Window { text: "a.txt".into(), window }])?;
/// let line = r#"{"text":"a.txt","begin":0,"end":16,"counted":15,"loglikelihood":-31.5}"#;
/// assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{line}\n"));
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn save_samples(path: &Path, samples: &[Sample]) -> Result<()> {
    files::write_atomically(path, |out| {
        samples.iter().try_for_each(|sample| {
            serde_json::to_writer(&mut *out, sample)?;
            writeln!(out)
        })
    })
}

impl Mean {
    /// Of at least one answer.
    pub fn of(right: &[bool]) -> Mean {
        let (n, sum) = (right.len() as f64, right.iter().filter(|&&right| right).count() as f64);
        let mean = sum / n;
        // Squares of 1 − mean and of mean.
        let squares = sum * (1.0 - mean) * (1.0 - mean) + (n - sum) * mean * mean;
        Mean { mean, stderr: (right.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt()) }
    }
}

impl Right {
    /// Of some records, and the log-likelihood of each choice of each.
    pub fn of(records: &[Record], found: &[Vec<f64>]) -> Right {
        let pairs = || records.iter().zip(found);
        Right {
            acc: pairs().map(|(record, found)| best(found) == record.gold).collect(),
            norm: pairs().map(|(record, found)| Some(best(&by_length(record, found)?) == record.gold)).collect(),
        }
    }

    /// Those of the score that stands for a task: acc_norm where the harness reports it, else acc.
    pub fn main(self, task: &str) -> Vec<bool> {
        let norm = task.parse::<Task>().is_ok_and(Task::has_norm);
        self.norm.filter(|_| norm).unwrap_or(self.acc)
    }
}

impl TaskScore {
    /// Of some records, and the log-likelihood of each choice of each.
    pub fn of(task: &str, shots: usize, cut: usize, records: &[Record], found: &[Vec<f64>]) -> TaskScore {
        let Right { acc, norm } = Right::of(records, found);
        TaskScore {
            task: task.into(),
            records: records.len(),
            shots,
            acc: Mean::of(&acc),
            acc_norm: norm.map(|norm| Mean::of(&norm)),
            cut,
        }
    }
}

impl Lines for TaskScore {
    const TOGETHER: &[&str] = &[];

    fn lines(&self) -> Vec<Cells> {
        let percent = |share: f64| format!("{:.2}", share * 100.0);
        let mean = |mean: Mean| match mean.stderr {
            Some(stderr) => format!("{} ± {}", percent(mean.mean), percent(stderr)),
            None => percent(mean.mean),
        };
        vec![vec![
            ("task", self.task.clone()),
            ("records", self.records.to_string()),
            ("shots", self.shots.to_string()),
            ("acc %", mean(self.acc)),
            ("acc_norm %", self.acc_norm.map_or("-".into(), mean)),
        ]]
    }
}

impl Lines for TextScore {
    const TOGETHER: &[&str] = &[];

    fn lines(&self) -> Vec<Cells> {
        vec![vec![
            ("text", self.text.clone()),
            ("tokens", self.tokens.to_string()),
            ("window", self.window.to_string()),
            ("stride", self.stride.to_string()),
            ("loss", format!("{:.4}", self.loss)),
            ("perplexity", format!("{:.3}", self.perplexity)),
            ("bits/byte", format!("{:.4}", self.bits_per_byte)),
        ]]
    }
}

/// Log-likelihoods by the characters of the choice, without the space in front of it.
fn by_length(record: &Record, found: &[f64]) -> Option<Vec<f64>> {
    let Ask::Choices { choices, .. } = &record.ask else { return None };
    Some(found.iter().zip(choices).map(|(found, choice)| found / choice.chars().count() as f64).collect())
}

/// The first of the highest.
fn best(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(choices: &[&str], gold: usize) -> Record {
        let choices = choices.iter().map(|choice| choice.to_string()).collect();
        Record { id: None, description: String::new(), ask: Ask::Choices { context: "c".into(), choices }, gold }
    }

    /// Figures of the harness's `mean` and `mean_stderr`.
    #[test]
    fn standard_errors_are_of_the_sample() {
        let mean = Mean::of(&[true, false, true, true]);
        assert_eq!((mean.mean, mean.stderr), (0.75, Some(0.25)));
        assert_eq!(Mean::of(&[true, true]).stderr, Some(0.0));
        assert_eq!(Mean::of(&[true]).stderr, None);
        let many: Vec<bool> = (0..100).map(|i| i % 3 == 0).collect();
        let mean = Mean::of(&many);
        assert!((mean.mean - 0.34).abs() < 1e-12 && (mean.stderr.unwrap() - 0.047_609_522_856_952_33).abs() < 1e-12);
    }

    #[test]
    fn choices_are_compared_whole_and_by_their_characters() {
        let records = [record(&["ab", "abcd"], 1), record(&["é", "ab"], 0), record(&["a", "b", "c"], 1)];
        let found = [vec![-2.0, -3.0], vec![-3.0, -2.0], vec![-1.0, -1.0, -1.0]];
        // −1 and −0.75 by character; −3 and −1, since é is one character of two bytes; the first of equal ones.
        let score = TaskScore::of("t", 0, 0, &records, &found);
        assert_eq!((score.acc.mean, score.acc_norm.unwrap().mean), (0.0, 1.0 / 3.0));

        let ask = Ask::Contexts { contexts: vec!["a".into(), "bc".into()], continuation: "d".into() };
        let contexts = Record { ask, ..record(&[], 1) };
        let score = TaskScore::of("t", 0, 0, &[contexts], &[vec![-2.0, -1.0]]);
        assert_eq!((score.acc.mean, score.acc_norm), (1.0, None));
    }
}
