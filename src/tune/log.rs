//! The log of a run: a JSON object a line, one for every step and one for the result.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::train::StepReport;
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::plot::{Chart, Line, Pen};

/// A log that is written.
///
/// ```
/// use mindskip::tune::log::Log;
/// use mindskip::tune::train::StepReport;
///
/// let report = |step| StepReport {
///     step,
///     loss: 1.5,
///     capacity: 0.5,
///     capacities: vec![0.25, 0.75],
///     lambda: 0.2,
///     lr: 0.01,
///     tokens: 64,
///     kept: None,
/// };
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("log.jsonl");
/// let mut log = Log::open(&path, 0)?;
/// log.write(&report(1))?;
/// log.write(&report(2))?;
/// log.write(&serde_json::json!({"result": "no step"}))?;
/// Log::open(&path, 1)?.write(&report(2))?; // goes on from a checkpoint of step 1
/// assert_eq!(Log::steps(&path)?, [report(1), report(2)]);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Log {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Log {
    /// Begins a log; of a run of which steps were `taken` before, it goes on behind these. Errors: Io.
    pub fn open(path: &Path, taken: usize) -> Result<Log> {
        let mut options = OpenOptions::new();
        if taken > 0 {
            let old = files::read(path)?;
            let is_kept = |line: &&[u8]| step_of(line).is_some_and(|report| report.step <= taken);
            let kept: Vec<&[u8]> = old.split_inclusive(|&b| b == b'\n').filter(is_kept).collect();
            files::write_atomically(path, |file| kept.iter().try_for_each(|line| file.write_all(line)))?;
            options.append(true);
        } else {
            options.create(true).write(true).truncate(true);
        }
        let file = options.open(path).map_err(|e| failed(path, &e))?;
        Ok(Log { path: path.into(), file: BufWriter::new(file) })
    }

    /// Adds a line. Errors: Io.
    pub fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(value).expect("names and numbers");
        writeln!(self.file, "{line}").and_then(|()| self.file.flush()).map_err(|e| failed(&self.path, &e))
    }

    /// The steps that a log tells of. Errors: Io.
    pub fn steps(path: &Path) -> Result<Vec<StepReport>> {
        Ok(files::read(path)?.split(|&b| b == b'\n').filter_map(step_of).collect())
    }
}

fn step_of(line: &[u8]) -> Option<StepReport> {
    serde_json::from_slice(line).ok()
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::new(Kind::Io, format!("the log cannot be written: {error}")).at(path).action("check the path and the disk")
}

/// The loss over the steps, and the capacity, that of all `layers` and of each.
///
/// ```
/// use mindskip::tune::log::charts;
/// use mindskip::tune::train::StepReport;
///
/// let (capacities, kept) = (vec![0.25, 0.75], None);
/// let report =
///     StepReport { step: 1, loss: 1.5, capacity: 0.5, capacities, lambda: 0.2, lr: 0.01, tokens: 64, kept };
/// let [loss, capacity] = charts("a run", &[3, 4], &[report]);
/// assert_eq!((loss.title.as_str(), &loss.lines[0].points[..]), ("a run", &[(1.0, 1.5)][..]));
/// let names: Vec<_> = capacity.lines.iter().map(|line| line.name.as_str()).collect();
/// assert_eq!(names, ["layer 3", "layer 4", "all"]);
/// ```
pub fn charts(title: &str, layers: &[usize], steps: &[StepReport]) -> [Chart; 2] {
    let line = |name: String, pen, of: &dyn Fn(&StepReport) -> Option<f64>| Line {
        name,
        points: steps.iter().filter_map(|step| Some((step.step as f64, of(step)?))).collect(),
        pen,
    };
    let each = layers.iter().enumerate().map(|(nth, layer)| {
        let pen = Pen::Of(nth as f64 / (layers.len() - 1).max(1) as f64);
        line(format!("layer {layer}"), pen, &|step| step.capacities.get(nth).copied())
    });
    let all = line("all".into(), Pen::Main, &|step| Some(step.capacity));
    let chart =
        |title: String, y: &str, lines| Chart { title, x: "step".into(), y: y.into(), lines, ..Chart::default() };
    [
        chart(title.into(), "loss", vec![line("loss".into(), Pen::Main, &|step| Some(step.loss))]),
        chart("active (token, layer) pairs".into(), "capacity", each.chain([all]).collect()),
    ]
}
