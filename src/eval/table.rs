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
/// use mindskip::eval::table::{TableRow, set_deltas};
/// use mindskip::eval::{Mean, TaskScore};
///
/// let file = std::fs::read("examples/bench.json").unwrap(); // of `mindskip bench`
/// let [dense, routed]: [Row; 2] = serde_json::from_slice(&file).unwrap();
/// let score = |right: &[bool]| {
///     [TaskScore { task: "rte".into(), records: 4, shots: 0, acc: Mean::of(right), acc_norm: None, cut: 0 }]
/// };
/// let mut rows = [
///     TableRow::new("…", None, 1.0, &score(&[true, true, true, false]), dense),
///     TableRow::new("…", Some(Path::new("a.safetensors")), 0.5, &score(&[true, true, false, false]), routed),
/// ];
/// set_deltas(&mut rows);
/// assert_eq!((rows[0].delta, rows[1].delta, rows[1].scores["rte"].mean), (0.0, -0.25, 0.5));
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
    /// The average less that of the dense model.
    pub delta: f64,
    /// How it was measured, with the share that was active there.
    pub speed: Row,
}

impl TaskScore {
    /// The score that stands for a task: acc_norm where the harness reports it, else acc.
    pub fn main(&self) -> Mean {
        let norm = self.task.parse::<Task>().is_ok_and(Task::has_norm);
        self.acc_norm.filter(|_| norm).unwrap_or(self.acc)
    }
}

impl TableRow {
    /// The routers of a file, or none, with what they did in the tasks and the measurement. `delta` is 0.
    pub fn new(command: &str, routers: Option<&Path>, capacity: f64, scores: &[TaskScore], speed: Row) -> TableRow {
        let scores: BTreeMap<String, Mean> = scores.iter().map(|score| (score.task.clone(), score.main())).collect();
        TableRow {
            command: command.into(),
            model: speed.head.model.clone(),
            routing: speed.routing.clone(),
            routers: routers.map(|path| path.display().to_string()),
            keys: speed.keys.clone(),
            layers: speed.layers.clone(),
            capacity,
            average: scores.values().map(|score| score.mean).sum::<f64>() / scores.len() as f64,
            scores,
            delta: 0.0,
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
        let delta = if dense { "-".into() } else { format!("{:+.2}", self.delta * 100.0) };
        for (name, cell) in [("average", percent(self.average)), ("delta", delta), ("capacity", percent(self.capacity))]
        {
            cells.push((name.into(), cell));
        }
        cells
    }
}

/// Sets what each row gains or loses on the first, which is the dense model's.
///
/// ```
/// use mindskip::bench::Row;
/// use mindskip::eval::table::{TableRow, set_deltas};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let speeds: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let row = |(speed, average)| TableRow { average, ..TableRow::new("…", None, 1.0, &[], speed) };
/// let mut rows: Vec<TableRow> = speeds.into_iter().zip([0.75, 0.5]).map(row).collect();
/// set_deltas(&mut rows);
/// assert_eq!((rows[0].delta, rows[1].delta), (0.0, -0.25));
/// ```
pub fn set_deltas(rows: &mut [TableRow]) {
    let dense = rows.first().map_or(0.0, |row| row.average);
    rows.iter_mut().for_each(|row| row.delta = row.average - dense);
}

/// Writes rows. Errors: those of `out`.
///
/// ```
/// use mindskip::bench::{Format, Row};
/// use mindskip::eval::table::{TableRow, write};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let speeds: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let row = |speed| TableRow { average: 0.625, ..TableRow::new("…", None, 1.0, &[], speed) };
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
/// use mindskip::eval::table::{TableRow, save};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let speeds: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let row = |speed| TableRow { average: 0.625, ..TableRow::new("…", None, 1.0, &[], speed) };
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
