//! Two saved results beside each other.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::format::{Cells, Lines, or_dash, short};
use super::stats::{Stats, differ};
use super::{Head, OpRow, Phase, Row};
use crate::error::{Error, Kind, Result};
use crate::files;

/// What `mindskip bench` saved as JSON or JSON lines.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::bench::Saved;
///
/// let path = Path::new("examples/bench.json"); // of `mindskip bench --format json -o`
/// assert_eq!(Saved::open(path)?, Saved::parse(&std::fs::read(path).unwrap())?);
/// assert!(Saved::parse(b"[]").is_err(), "no measurement");
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    tests: Vec<Test>,
}

/// One thing that was measured.
#[derive(Debug, Clone, PartialEq)]
struct Test {
    what: What,
    /// Of machine and model, by name: part of `what` where a result has several of them.
    settings: Vec<(&'static str, String)>,
    /// Seconds.
    samples: Vec<f64>,
}

/// What a test is known by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct What {
    /// "prefill 512", "decode 64", "attend of 1 row".
    pub test: String,
    pub routing: Option<String>,
    pub keys: Option<String>,
    pub capacity: Option<f64>,
    /// None for an op.
    pub batch: Option<usize>,
    /// Tokens in the cache before, of an op with its own rows.
    pub depth: usize,
}

/// How a test came out in both results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// B takes less time.
    Faster,
    /// B takes more time.
    Slower,
    /// The difference is within what repetitions scatter by, or is small.
    Same,
    /// Too few repetitions to tell.
    TooFew,
    /// B has no such test.
    OnlyA,
    /// A has no such test.
    OnlyB,
}

/// A test of two results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    #[serde(flatten)]
    pub what: What,
    /// Settings that tell this test from others of the same name: "dtype bf16, threads 2".
    pub setting: String,
    /// Seconds: the medians of both.
    pub a: Option<f64>,
    pub b: Option<f64>,
    /// B by A: above 1 is slower.
    pub ratio: Option<f64>,
    pub verdict: Verdict,
}

/// Tests of two results, and what else differs between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    pub rows: Vec<Comparison>,
    /// "driver: 570.1 and 580.2".
    pub differences: Vec<String>,
}

impl Saved {
    /// Reads a result. Errors: Io; Format for what is none.
    pub fn open(path: &Path) -> Result<Saved> {
        Saved::parse(&files::read(path)?).map_err(|e| e.at(path))
    }

    /// From JSON, or JSON lines. Errors: Format.
    pub fn parse(bytes: &[u8]) -> Result<Saved> {
        let text = std::str::from_utf8(bytes).map_err(|_| broken("it is not text"))?;
        let records: Vec<Value> = if text.trim_start().starts_with('[') {
            serde_json::from_str(text).map_err(|e| broken(&e.to_string()))?
        } else {
            let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
            let read = |(i, line)| serde_json::from_str(line).map_err(|e| broken(&format!("line {}: {e}", i + 1)));
            lines.map(read).collect::<Result<_>>()?
        };
        let mut tests: Vec<Test> = Vec::new();
        for (i, record) in records.into_iter().enumerate() {
            let own = tests_of(record).map_err(|cause| broken(&format!("record {}: {cause}", i + 1)))?;
            for test in own {
                let number = |x: &f64| x.is_finite() && *x > 0.0;
                if test.samples.is_empty() || !test.samples.iter().all(number) {
                    return Err(broken(&format!("record {}: {} has no times, or wrong ones", i + 1, test.what.test)));
                }
                match tests.iter_mut().find(|known| known.what == test.what && known.settings == test.settings) {
                    Some(known) => known.samples.extend(test.samples),
                    None => tests.push(test),
                }
            }
        }
        if tests.is_empty() {
            return Err(broken("it holds no measurement"));
        }
        Ok(Saved { tests })
    }

    /// Every value of a setting.
    fn values(&self, name: &str) -> Vec<&str> {
        let own = self.tests.iter().flat_map(|test| &test.settings).filter(|(own, _)| *own == name);
        let mut values: Vec<&str> = own.map(|(_, value)| value.as_str()).collect();
        values.sort_unstable();
        values.dedup();
        values
    }
}

fn broken(cause: &str) -> Error {
    let action = "give what mindskip bench wrote with --format json or jsonl";
    Error::new(Kind::Format, format!("no result of a bench: {cause}")).action(action)
}

/// The tests of a record of either kind.
fn tests_of(record: Value) -> std::result::Result<Vec<Test>, String> {
    fn read<T: DeserializeOwned>(record: Value) -> std::result::Result<T, String> {
        serde_json::from_value(record).map_err(|e| e.to_string())
    }
    if record.get("op").is_some() {
        let OpRow { head, op, rows, context, samples, .. } = read(record)?;
        let test = format!("{op} of {rows} row{}", if rows == 1 { "" } else { "s" });
        let what = What { test, routing: None, keys: None, capacity: None, batch: None, depth: context };
        return Ok(vec![Test { what, settings: settings(&head), samples }]);
    }
    let row: Row = read(record)?;
    let Row { head, prompt, generated, routing, keys, capacity, batch, depth, .. } = &row;
    let mut settings = settings(head);
    settings.push(("routers", or_dash(&row.routers)));
    settings.push(("seed", row.seed.to_string()));
    if routing != "dense" {
        settings.push(("layers", row.layers.iter().map(usize::to_string).collect::<Vec<_>>().join(",")));
    }
    let behind = if *prompt == 0 { String::new() } else { format!(" behind {prompt}") };
    let prefill = row.prefill.iter().map(|phase| (format!("prefill {prompt}"), phase));
    let decode = row.decode.iter().map(|phase| (format!("decode {generated}{behind}"), phase));
    let of = |(test, phase): (String, &Phase)| Test {
        what: What {
            test,
            routing: Some(routing.clone()),
            keys: keys.clone(),
            capacity: *capacity,
            batch: Some(*batch),
            depth: *depth,
        },
        settings: settings.clone(),
        samples: phase.samples.clone(),
    };
    Ok(prefill.chain(decode).map(of).collect())
}

fn settings(head: &Head) -> Vec<(&'static str, String)> {
    vec![
        ("cpu", head.cpu.clone()),
        ("device", head.device.clone()),
        ("driver", or_dash(&head.driver)),
        ("model", head.model.clone()),
        ("parameters", head.parameters.to_string()),
        ("dtype", head.dtype.clone()),
        ("K/V", head.kv_dtype.clone()),
        ("precision", head.precision.clone()),
        ("threads", or_dash(&head.threads)),
        ("kernels", or_dash(&head.kernels)),
    ]
}

/// Finds the tests of A in B. A setting that has several values in one of them is part of what was measured, and has to be the
/// same; one that is the same all over each of them may differ, and is told.
///
/// A test became faster or slower when the two-sided rank test of Mann and Whitney finds a difference at 1% and the medians differ by
/// the share `least` or more.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::bench::{Compared, Comparison, Format, Row, Saved, Verdict, What, compare, write};
///
/// let path = Path::new("examples/bench.json");
/// let mut rows: Vec<Row> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
/// for decode in rows.iter_mut().filter_map(|row| row.decode.as_mut()) {
///     decode.samples.iter_mut().for_each(|seconds| *seconds *= 10.0);
/// }
/// let mut slow = Vec::new();
/// write(Format::Json, &rows, &mut slow).unwrap();
/// let Compared { rows, differences } = compare(&Saved::open(path)?, &Saved::parse(&slow)?, 0.03);
/// assert!(differences.is_empty(), "of machine and settings");
/// for Comparison { what: What { test, .. }, ratio, verdict, .. } in rows {
///     let expected = if test == "decode 8 behind 64" { (10.0, Verdict::Slower) } else { (1.0, Verdict::Same) };
///     assert!((ratio.unwrap() - expected.0).abs() < 1e-9 && verdict == expected.1, "{test}: {ratio:?}, {verdict:?}");
/// }
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn compare(a: &Saved, b: &Saved, least: f64) -> Compared {
    let mut names: Vec<&'static str> = Vec::new();
    for (name, _) in a.tests.iter().chain(&b.tests).flat_map(|test| &test.settings) {
        if !names.contains(name) {
            names.push(name);
        }
    }
    let (swept, fixed): (Vec<&str>, Vec<&str>) =
        names.into_iter().partition(|name| a.values(name).len() > 1 || b.values(name).len() > 1);
    let differing = fixed.into_iter().filter_map(|name| match (a.values(name).as_slice(), b.values(name).as_slice()) {
        ([own], [other]) if own != other => Some(format!("{name}: {own} and {other}")),
        _ => None,
    });
    let setting = |test: &Test| {
        let own = test.settings.iter().filter(|(name, _)| swept.contains(name));
        own.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
    };
    let found = |test: &Test, other: &Saved| {
        other.tests.iter().position(|o| o.what == test.what && setting(o) == setting(test))
    };
    let row = |own: Option<&Test>, other: Option<&Test>| {
        let [a, b] = [own, other].map(|test| test.map(|test| Stats::of(&test.samples).median));
        let ratio = a.zip(b).map(|(a, b)| b / a);
        let verdict = match (own, other) {
            (Some(own), Some(other)) => verdict(&own.samples, &other.samples, least),
            (Some(_), None) => Verdict::OnlyA,
            _ => Verdict::OnlyB,
        };
        let test = own.or(other).expect("one of them");
        Comparison { what: test.what.clone(), setting: setting(test), a, b, ratio, verdict }
    };
    let both = a.tests.iter().map(|test| row(Some(test), found(test, b).map(|at| &b.tests[at])));
    let alone = b.tests.iter().filter(|test| found(test, a).is_none()).map(|test| row(None, Some(test)));
    Compared { rows: both.chain(alone).collect(), differences: differing.collect() }
}

fn verdict(a: &[f64], b: &[f64], least: f64) -> Verdict {
    let ratio = Stats::of(b).median / Stats::of(a).median;
    match differ(a, b) {
        None => Verdict::TooFew,
        Some(true) if ratio >= 1.0 + least => Verdict::Slower,
        Some(true) if ratio <= 1.0 / (1.0 + least) => Verdict::Faster,
        Some(_) => Verdict::Same,
    }
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Faster => "faster",
            Verdict::Slower => "slower",
            Verdict::Same => "same",
            Verdict::TooFew => "too few",
            Verdict::OnlyA => "only in A",
            Verdict::OnlyB => "only in B",
        }
    }
}

impl Lines for Comparison {
    const TOGETHER: &[&str] = &["setting", "batch", "depth", "test"];

    fn lines(&self) -> Vec<Cells> {
        let What { test, routing, keys, capacity, batch, depth } = &self.what;
        let ms = |seconds: Option<f64>| match seconds.map(|s| 1e3 * s) {
            Some(ms) if ms < 1.0 => format!("{} us", short(1e3 * ms)),
            Some(ms) => format!("{} ms", short(ms)),
            None => "-".into(),
        };
        vec![vec![
            ("setting", if self.setting.is_empty() { "-".into() } else { self.setting.clone() }),
            ("batch", or_dash(batch)),
            ("depth", depth.to_string()),
            ("test", test.clone()),
            ("routing", or_dash(routing)),
            ("keys", or_dash(keys)),
            ("capacity", or_dash(capacity)),
            ("A", ms(self.a)),
            ("B", ms(self.b)),
            ("B/A", self.ratio.map_or("-".into(), |ratio| format!("{ratio:.3}"))),
            ("change", self.verdict.name().into()),
        ]]
    }
}
