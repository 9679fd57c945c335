//! Records as a table for people, CSV, JSON, and JSON lines.

use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use super::{OpRow, Phase, Row};
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::memory::Size;

/// How records are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A Markdown table, for people: `md`.
    Md,
    /// A line for each record, with all its numbers: `csv`.
    Csv,
    /// One array: `json`.
    Json,
    /// A record a line: `jsonl`.
    Jsonl,
}

impl FromStr for Format {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "md" => Ok(Format::Md),
            "csv" => Ok(Format::Csv),
            "json" => Ok(Format::Json),
            "jsonl" => Ok(Format::Jsonl),
            _ => {
                Err(Error::new(Kind::Argument, format!("{text:?} is no format")).action("give md, csv, json or jsonl"))
            }
        }
    }
}

/// A line of a table: columns and what stands in them.
pub type Cells = Vec<(&'static str, String)>;

/// What has lines in a table.
///
/// ```
/// use mindskip::bench::{Cells, Format, Lines, write};
///
/// #[derive(serde::Serialize)]
/// struct Task {
///     name: &'static str,
///     acc: f64,
/// }
///
/// impl Lines for Task {
///     const TOGETHER: &[&str] = &[];
///
///     fn lines(&self) -> Vec<Cells> {
///         vec![vec![("task", self.name.into()), ("acc", format!("{:.1}%", 100.0 * self.acc))]]
///     }
/// }
///
/// let mut table = Vec::new();
/// write(Format::Md, &[Task { name: "piqa", acc: 0.5 }, Task { name: "rte", acc: 0.625 }], &mut table).unwrap();
/// assert!(String::from_utf8(table).unwrap().contains("|  rte | 62.5% |"));
/// ```
pub trait Lines: Serialize {
    /// Its lines; all have the same columns.
    fn lines(&self) -> Vec<Cells>;

    /// Lines with the same in these columns stand together.
    const TOGETHER: &[&str];
}

/// Writes records. Errors: those of `out`.
///
/// ```
/// use mindskip::bench::{Format, Row, write};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let rows: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let mut out = Vec::new();
/// write("jsonl".parse()?, &rows, &mut out).unwrap();
/// let last = out.split(|&byte| byte == b'\n').nth(1).unwrap();
/// assert_eq!(serde_json::from_slice::<Row>(last).unwrap(), rows[1]);
/// write(Format::Csv, &rows, &mut std::io::sink()).unwrap();
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn write<R: Lines>(format: Format, records: &[R], out: &mut dyn Write) -> io::Result<()> {
    let lines = || {
        let mut lines: Vec<_> = records.iter().flat_map(Lines::lines).collect();
        gather(&mut lines, R::TOGETHER);
        lines
    };
    write_lines(format, records, lines, out)
}

/// Writes records, of which a table has these lines.
pub(crate) fn write_lines<R: Serialize, N: AsRef<str>>(
    format: Format,
    records: &[R],
    lines: impl FnOnce() -> Vec<Vec<(N, String)>>,
    out: &mut dyn Write,
) -> io::Result<()> {
    match format {
        Format::Md => table(lines(), out),
        Format::Csv => csv(records, out),
        Format::Json => {
            serde_json::to_writer_pretty(&mut *out, records)?;
            writeln!(out)
        }
        Format::Jsonl => records.iter().try_for_each(|record| {
            serde_json::to_writer(&mut *out, record)?;
            writeln!(out)
        }),
    }
}

/// Writes records into a file, all or nothing. Errors: Io.
///
/// ```
/// use mindskip::bench::{Format, Row, Saved, save};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let rows: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("again.jsonl");
/// save(Format::Jsonl, &rows, &path)?;
/// assert_eq!(Saved::open(&path)?, Saved::parse(&file)?);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn save<R: Lines>(format: Format, records: &[R], path: &Path) -> Result<()> {
    files::write_atomically(path, |out| write(format, records, out))
}

/// Moves lines that have the same in some columns together, in the order in which they first come.
fn gather(lines: &mut [Cells], columns: &[&str]) {
    let key = |line: &Cells| -> Vec<String> {
        line.iter().filter(|(name, _)| columns.contains(name)).map(|(_, value)| value.clone()).collect()
    };
    let mut met: Vec<Vec<String>> = Vec::new();
    for line in lines.iter() {
        let key = key(line);
        if !met.contains(&key) {
            met.push(key);
        }
    }
    lines.sort_by_key(|line| met.iter().position(|known| *known == key(line)));
}

/// A Markdown table. What is the same in all lines stands above it, not in it.
fn table<N: AsRef<str>>(lines: Vec<Vec<(N, String)>>, out: &mut dyn Write) -> io::Result<()> {
    let Some(first) = lines.first() else { return Ok(()) };
    let same = |i: usize| lines.len() > 1 && lines.iter().all(|line| line[i].1 == first[i].1);
    let (above, columns): (Vec<_>, Vec<_>) = (0..first.len()).partition(|&i| same(i));
    for i in above {
        let (name, value) = &first[i];
        if value != "-" {
            writeln!(out, "{}: {value}  ", name.as_ref())?;
        }
    }
    writeln!(out)?;
    let widths: Vec<usize> = columns
        .iter()
        .map(|&i| {
            lines.iter().map(|line| line[i].1.chars().count()).chain([first[i].0.as_ref().len(), 2]).max().unwrap_or(2)
        })
        .collect();
    let mut row = |cells: Vec<String>| writeln!(out, "| {} |", cells.join(" | "));
    let padded = |text: &str, width: usize| format!("{text:>width$}");
    row(columns.iter().zip(&widths).map(|(&i, &width)| padded(first[i].0.as_ref(), width)).collect())?;
    row(widths.iter().map(|width| format!("{:->width$}", ":")).collect())?;
    lines.iter().try_for_each(|line| row(columns.iter().zip(&widths).map(|(&i, &w)| padded(&line[i].1, w)).collect()))
}

/// A column for each number of the record; those of a part begin with its name, lists are joined by spaces.
fn csv<R: Serialize>(records: &[R], out: &mut dyn Write) -> io::Result<()> {
    let flat: Vec<Vec<(String, String)>> = records
        .iter()
        .map(|record| {
            let mut cells = Vec::new();
            flatten("", &serde_json::to_value(record)?, &mut cells);
            Ok(cells)
        })
        .collect::<io::Result<_>>()?;
    // A part that a record lacks is one empty cell there.
    let Some(longest) = flat.iter().max_by_key(|cells| cells.len()) else { return Ok(()) };
    let columns: Vec<&String> = longest.iter().map(|(name, _)| name).collect();
    let mut writer = csv::Writer::from_writer(out);
    writer.write_record(&columns)?;
    for cells in &flat {
        let cell = |name: &&String| cells.iter().find(|(own, _)| own == *name).map_or("", |(_, value)| value);
        writer.write_record(columns.iter().map(cell))?;
    }
    writer.flush()
}

fn flatten(prefix: &str, value: &Value, cells: &mut Vec<(String, String)>) {
    let text = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    match value {
        Value::Object(parts) => parts.iter().for_each(|(name, part)| {
            let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}_{name}") };
            flatten(&name, part, cells);
        }),
        Value::Array(list) => cells.push((prefix.into(), list.iter().map(text).collect::<Vec<_>>().join(" "))),
        other => cells.push((prefix.into(), text(other))),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// Three digits that count: 0.00987, 9.87, 98.7, 987; all of those before the point, 9870.
pub(super) fn short(x: f64) -> String {
    let places = if x > 0.0 { 2.0 - x.log10().floor() } else { 2.0 };
    format!("{x:.*}", places.clamp(0.0, 9.0) as usize)
}

pub(super) fn or_dash<T: ToString>(value: &Option<T>) -> String {
    value.as_ref().map_or("-".into(), T::to_string)
}

impl super::Head {
    pub(super) fn cells(&self) -> Cells {
        let sources = self.commit.as_ref().map_or(String::new(), |commit| format!(" ({commit})"));
        vec![
            ("mindskip", format!("{}{sources}", self.version)),
            ("cpu", self.cpu.clone()),
            ("device", self.device.clone()),
            ("driver", or_dash(&self.driver)),
            ("model", format!("{}, {:.1}M parameters", self.model, self.parameters as f64 / 1e6)),
            ("weights", self.dtype.clone()),
            ("K/V", self.kv_dtype.clone()),
            ("kernels", or_dash(&self.kernels)),
            ("copy", format!("{} GB/s", short(self.copy_rate / 1e9))),
            ("product", format!("{} GFLOP/s", short(self.product_rate / 1e9))),
        ]
    }
}

impl Lines for Row {
    const TOGETHER: &[&str] = &["device", "weights", "K/V", "kernels", "batch", "depth", "test"];

    fn lines(&self) -> Vec<Cells> {
        let line = |test: &str, phase: &Phase| {
            let compared = |text: String| if self.routing == "dense" { "-".into() } else { text };
            let saved = self.kv_saved as f64 / (self.kv + self.kv_saved).max(1) as f64;
            let mut cells = self.head.cells();
            cells.extend([
                ("repetitions", self.reps.to_string()),
                ("batch", self.batch.to_string()),
                ("depth", self.depth.to_string()),
                ("test", test.to_owned()),
                ("routing", self.routing.clone()),
                ("keys", or_dash(&self.keys)),
                ("capacity", self.routers.as_ref().map_or(or_dash(&self.capacity), |_| "routers".into())),
                ("active", percent(self.active)),
                ("tok/s", short(phase.tokens_per_s)),
                ("spread", percent(phase.spread)),
                ("ms/tok", short(phase.ms_per_token)),
                ("speedup", compared(format!("{:.2}", phase.speedup))),
                ("ideal", compared(format!("{:.2}", phase.ideal_speedup))),
                ("efficiency", compared(format!("{:.2}", phase.skip_efficiency))),
                ("of ideal", percent(phase.of_ideal)),
                ("memory", Size(self.memory).to_string()),
                ("K/V saved", percent(saved)),
                ("syncs", short(phase.syncs)),
                ("launches", short(phase.launches + phase.replays)),
            ]);
            cells
        };
        let prefill = self.prefill.iter().map(|phase| line(&format!("prefill {}", self.prompt), phase));
        let decode = self.decode.iter().map(|phase| line(&format!("decode {}", self.generated), phase));
        prefill.chain(decode).collect()
    }
}

impl Lines for OpRow {
    const TOGETHER: &[&str] = &["device", "weights", "K/V", "kernels", "rows"];

    fn lines(&self) -> Vec<Cells> {
        let mut cells = self.head.cells();
        cells.extend([
            ("context", self.context.to_string()),
            ("op", self.op.clone()),
            ("rows", self.rows.to_string()),
            ("us", short(self.us)),
            ("spread", percent(self.spread)),
            ("GB/s", short(self.bytes_per_s / 1e9)),
            ("GFLOP/s", short(self.flops_per_s / 1e9)),
            ("of ideal", percent(self.of_ideal)),
        ]);
        vec![cells]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Head;

    fn head() -> Head {
        Head {
            version: "0.1.0".into(),
            commit: None,
            date: "2026-01-02T03:04:05Z".into(),
            cpu: "A \"CPU\", with 2 cores".into(),
            device: "cpu, 2 threads".into(),
            driver: None,
            model: "stories".into(),
            parameters: 1_700_000,
            dtype: "bf16".into(),
            kv_dtype: "f32".into(),
            precision: "f32".into(),
            threads: Some(2),
            kernels: None,
            copy_rate: 2e10,
            product_rate: 1.5e11,
        }
    }

    fn row(routing: &str, prefill: bool) -> Row {
        let phase = Phase {
            tokens_per_s: 1000.0,
            spread: 0.0125,
            ms_per_token: 1.0,
            speedup: 1.5,
            ideal_speedup: 2.0,
            skip_efficiency: 0.75,
            of_ideal: 0.5,
            flops: 7,
            bytes: 8,
            launches: 1.0,
            replays: 1.0,
            syncs: 2.0,
            copied_bytes: 4096.0,
            samples: vec![0.5, 0.25],
        };
        Row {
            head: head(),
            batch: 1,
            depth: 0,
            prompt: 512,
            generated: 64,
            routing: routing.into(),
            keys: (routing != "dense").then(|| "all".into()),
            capacity: (routing != "dense").then_some(0.3),
            routers: None,
            layers: vec![3, 4],
            seed: u64::MAX,
            warmup: 1,
            reps: 2,
            active: 0.5,
            memory: 1 << 20,
            kv: 75,
            kv_saved: 25,
            first_token_ms: prefill.then_some(12.5),
            prefill: prefill.then(|| phase.clone()),
            decode: Some(phase),
        }
    }

    fn written<R: Lines>(format: Format, records: &[R]) -> String {
        let mut bytes = Vec::new();
        write(format, records, &mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_reads_back_as_it_was() {
        let rows = [row("dense", true), row("attn_token", false)];
        assert_eq!(serde_json::from_str::<Vec<Row>>(&written(Format::Json, &rows)).unwrap(), rows);
        let lines = written(Format::Jsonl, &rows);
        let read: Vec<Row> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(read, rows);
    }

    #[test]
    fn csv_has_a_cell_for_each_number_of_each_row() {
        let text = written(Format::Csv, &[row("dense", true), row("attn_token", false)]);
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let columns = reader.headers().unwrap().clone();
        let records: Vec<_> = reader.records().map(Result::unwrap).collect();
        assert_eq!(records.len(), 2);
        let cell = |i: usize, name: &str| {
            let at =
                columns.iter().position(|column| column == name).unwrap_or_else(|| panic!("{name} in {columns:?}"));
            records[i][at].to_owned()
        };
        assert_eq!(cell(0, "cpu"), "A \"CPU\", with 2 cores");
        assert_eq!((cell(0, "routing"), cell(1, "routing")), ("dense".into(), "attn_token".into()));
        assert_eq!((cell(0, "capacity"), cell(1, "capacity")), (String::new(), "0.3".into()));
        assert_eq!(cell(1, "decode_samples"), "0.5 0.25");
        assert_eq!(
            (cell(0, "prefill_tokens_per_s"), cell(1, "prefill_tokens_per_s")),
            ("1000.0".into(), String::new())
        );
        assert_eq!(cell(0, "seed"), u64::MAX.to_string());
    }

    #[test]
    fn tables_say_once_what_is_the_same() {
        let text = written(Format::Md, &[row("dense", true), row("attn_token", false), row("mlp_token", true)]);
        let (above, table) = text.split_once("\n\n").unwrap();
        assert!(above.contains("model: stories, 1.7M parameters  \n"), "{text}");
        assert!(!above.contains("driver"), "what is not known is not said: {text}");
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 2 + 5, "three have a decode phase, two a prefill: {text}");
        assert!(lines.iter().all(|line| line.chars().count() == lines[0].chars().count()), "{text}");
        let cells = |i: usize| lines[i].split('|').map(str::trim).filter(|cell| !cell.is_empty()).collect::<Vec<_>>();
        assert_eq!(cells(0), ["test", "routing", "keys", "capacity", "speedup", "ideal", "efficiency"]);
        assert_eq!(cells(2), ["prefill 512", "dense", "-", "-", "-", "-", "-"]);
        assert_eq!(cells(3)[..2], ["prefill 512", "mlp_token"], "together with the other prefill");
        assert_eq!(cells(4)[..2], ["decode 64", "dense"]);
        assert_eq!(cells(5), ["decode 64", "attn_token", "all", "0.3", "1.50", "2.00", "0.75"]);
        assert_eq!(written::<Row>(Format::Md, &[]), "");
    }

    #[test]
    fn numbers_are_short() {
        let all = [0.0, 0.000_456_7, 0.0123, 0.1, 1.0, 9.876, 12.345, 100.0, 987.6, 12_345.6].map(short);
        assert_eq!(all, ["0.00", "0.000457", "0.0123", "0.100", "1.00", "9.88", "12.3", "100", "988", "12346"]);
    }
}
