//! The paper's table: what routers cost in quality and what they buy in speed, beside the dense model.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::result::{Mean, TaskScore};
use super::task::Task;
use crate::bench::{Format, Phase, Row, write_lines};
use crate::error::Result;
use crate::files;

/// A way to run the model: the dense one, or routers.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::bench::Row;
/// use mindskip::eval::table::{Quality, TableRow};
/// use mindskip::eval::{Mean, TaskScore};
///
/// let quality = |right: &[bool], capacity| {
///     let (task, acc) = ("rte".into(), Mean::of(right));
///     let score = TaskScore { task, records: right.len(), shots: 0, acc, acc_norm: None, cut: 0 };
///     Quality { capacity, scores: vec![score], right: vec![right.to_vec()] }
/// };
/// let dense = quality(&[true, true, true, false], 1.0);
/// let routed = quality(&[true, true, false, false], 0.5);
/// assert_eq!(routed.beside(&dense), Mean { mean: -0.25, stderr: Some(0.25) }, "they differ in one record");
///
/// let file = std::fs::read("examples/bench.json").unwrap(); // of `mindskip bench`
/// let [_, speed]: [Row; 2] = serde_json::from_slice(&file).unwrap();
/// let row = TableRow::new("…", Some(Path::new("a.safetensors")), &routed, &dense, speed);
/// assert_eq!((row.average, row.delta.mean, row.scores["rte"].mean), (0.5, -0.25, 0.5));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableRow {
    /// By which the table was made.
    pub command: String,
    pub model: String,
    /// `dense`, or the granularity.
    pub routing: String,
    pub routers: Option<String>,
    pub keys: Option<String>,
    pub layers: Vec<usize>,
    /// The share of (token, routed layer) pairs that were active in the tasks.
    pub capacity: f64,
    /// By task: see [`TaskScore::main`].
    pub scores: BTreeMap<String, Mean>,
    /// Of the scores.
    pub average: f64,
    /// The average less that of the dense model, see [`Quality::beside`].
    pub delta: Mean,
    /// How it was measured, with the share that was active there.
    pub speed: Row,
}

/// How well a way answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Quality {
    /// The share of (token, routed layer) pairs that were active.
    pub capacity: f64,
    /// By task.
    pub scores: Vec<TaskScore>,
    /// By task and record: whether what [`TaskScore::main`] counts was right.
    pub right: Vec<Vec<bool>>,
}

impl Quality {
    fn average(&self) -> f64 {
        self.scores.iter().map(|score| score.main().mean).sum::<f64>() / self.scores.len() as f64
    }

    /// What the average gains or loses on that of `dense`, which answered the same records. Its standard error is that of the
    /// records' differences: what both get right, or both get wrong, adds none.
    pub fn beside(&self, dense: &Quality) -> Mean {
        let error = |(own, dense): (&Vec<bool>, &Vec<bool>)| {
            let n = own.len() as f64;
            let differences = || own.iter().zip(dense).map(|(&own, &dense)| f64::from(own) - f64::from(dense));
            let mean = differences().sum::<f64>() / n;
            (own.len() > 1).then(|| differences().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0) / n)
        };
        let squares: Option<f64> = self.right.iter().zip(&dense.right).map(error).sum();
        let stderr = squares.map(|squares| squares.sqrt() / self.right.len() as f64);
        Mean { mean: self.average() - dense.average(), stderr }
    }
}

impl TaskScore {
    /// The score that stands for a task: acc_norm where the harness reports it, else acc.
    pub fn main(&self) -> Mean {
        let norm = self.task.parse::<Task>().is_ok_and(Task::has_norm);
        self.acc_norm.filter(|_| norm).unwrap_or(self.acc)
    }
}

impl TableRow {
    /// The routers of a file, or none, with what they did in the tasks, beside the dense model, and the measurement.
    pub fn new(command: &str, routers: Option<&Path>, quality: &Quality, dense: &Quality, speed: Row) -> TableRow {
        TableRow {
            command: command.into(),
            model: speed.head.model.clone(),
            routing: speed.routing.clone(),
            routers: routers.map(|path| path.display().to_string()),
            keys: speed.keys.clone(),
            layers: speed.layers.clone(),
            capacity: quality.capacity,
            scores: quality.scores.iter().map(|score| (score.task.clone(), score.main())).collect(),
            average: quality.average(),
            delta: quality.beside(dense),
            speed,
        }
    }

    fn cells(&self) -> Vec<(String, String)> {
        let dense = self.routers.is_none();
        let percent = |share: f64| format!("{:.2}", share * 100.0);
        let speed = |phase: &Option<Phase>, ideal: bool| match phase {
            Some(phase) if !dense => format!("{:.2}", if ideal { phase.ideal_speedup } else { phase.speedup }),
            _ => "-".into(),
        };
        let Row { prompt, generated, prefill, decode, .. } = &self.speed;
        let routers = self.routers.as_ref().map(Path::new).and_then(Path::file_name);
        let mut cells: Vec<(String, String)> = [
            ("command", self.command.clone()),
            ("model", self.model.clone()),
            ("device", self.speed.head.device.clone()),
            ("routing", self.routing.clone()),
            ("routers", routers.map_or("-".into(), |name| name.to_string_lossy().into_owned())),
            (&format!("prefill {prompt}"), speed(prefill, false)),
            ("ideal", speed(prefill, true)),
            (&format!("decode {generated}"), speed(decode, false)),
            ("ideal", speed(decode, true)),
        ]
        .map(|(name, cell)| (name.to_string(), cell))
        .to_vec();
        cells.extend(self.scores.iter().map(|(task, score)| (task.clone(), percent(score.mean))));
        let delta = match self.delta {
            _ if dense => "-".into(),
            Mean { mean, stderr: Some(stderr) } => format!("{:+.2} ± {}", mean * 100.0, percent(stderr)),
            Mean { mean, .. } => format!("{:+.2}", mean * 100.0),
        };
        for (name, cell) in [("average", percent(self.average)), ("delta", delta), ("capacity", percent(self.capacity))]
        {
            cells.push((name.into(), cell));
        }
        cells
    }
}

/// Writes rows. Errors: those of `out`.
///
/// ```
/// use mindskip::bench::{Format, Row};
/// use mindskip::eval::table::{Quality, TableRow, write};
/// use mindskip::eval::{Mean, TaskScore};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let speeds: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let acc = Mean { mean: 0.625, stderr: None };
/// let score = TaskScore { task: "rte".into(), records: 1, shots: 0, acc, acc_norm: None, cut: 0 };
/// let quality = Quality { capacity: 1.0, scores: vec![score], right: vec![vec![true]] };
/// let row = |speed| TableRow::new("…", None, &quality, &quality, speed);
/// let rows: Vec<TableRow> = speeds.into_iter().map(row).collect();
/// let mut table = Vec::new();
/// write(Format::Md, &rows, &mut table).unwrap();
/// let table = String::from_utf8(table).unwrap();
/// assert!(table.contains("average: 62.50") && table.contains("| attn_token |"), "what is the same is told once");
/// ```
pub fn write(format: Format, rows: &[TableRow], out: &mut dyn Write) -> io::Result<()> {
    write_lines(format, rows, || rows.iter().map(TableRow::cells).collect(), out)
}

/// Writes rows into a file, all or nothing. Errors: Io.
///
/// ```
/// use mindskip::bench::{Format, Row};
/// use mindskip::eval::table::{Quality, TableRow, save};
/// use mindskip::eval::{Mean, TaskScore};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let speeds: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let acc = Mean { mean: 0.625, stderr: None };
/// let score = TaskScore { task: "rte".into(), records: 1, shots: 0, acc, acc_norm: None, cut: 0 };
/// let quality = Quality { capacity: 1.0, scores: vec![score], right: vec![vec![true]] };
/// let row = |speed| TableRow::new("…", None, &quality, &quality, speed);
/// let rows: Vec<TableRow> = speeds.into_iter().map(row).collect();
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("table.json");
/// save(Format::Json, &rows, &path)?;
/// let saved: Vec<TableRow> = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
/// assert_eq!(saved, rows);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn save(format: Format, rows: &[TableRow], path: &Path) -> Result<()> {
    files::write_atomically(path, |out| write(format, rows, out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quality(right: &[&[bool]]) -> Quality {
        let score = |right: &&[bool]| TaskScore {
            task: "t".into(),
            records: right.len(),
            shots: 0,
            acc: Mean::of(right),
            acc_norm: None,
            cut: 0,
        };
        let scores = right.iter().map(score).collect();
        Quality { capacity: 1.0, scores, right: right.iter().map(|right| right.to_vec()).collect() }
    }

    #[test]
    fn differences_are_those_of_the_records() {
        let dense = quality(&[&[true, false, true, true], &[false, true]]);
        assert_eq!(dense.beside(&dense), Mean { mean: 0.0, stderr: Some(0.0) });
        // −1, 0, 0, 0: deviation 0.5, error 0.25; 1, 0: deviation √½, error ½.
        let own = quality(&[&[false, false, true, true], &[true, true]]);
        let Mean { mean, stderr } = own.beside(&dense);
        assert!((mean - 0.125).abs() < 1e-12, "{mean}");
        assert!((stderr.unwrap() - (0.0625_f64 + 0.25).sqrt() / 2.0).abs() < 1e-12, "{stderr:?}");
        assert_eq!(quality(&[&[true]]).beside(&quality(&[&[false]])), Mean { mean: 1.0, stderr: None });
    }
}
