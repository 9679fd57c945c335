//! Charts of a sweep: what was measured, and beside it, dashed, what the machine could do at best.

use super::{Head, Phase, Row};
use crate::plot::{Chart, Line, Pen};

/// What is swept beside capacity: its name, and its value of a row.
type Variable = (&'static str, fn(&Row) -> usize);

const VARIABLES: [Variable; 3] = [("depth", |row| row.depth), ("prompt", |row| row.prompt), ("batch", |row| row.batch)];

/// A phase: its name, and what a row has of it.
type PhaseOf = (&'static str, fn(&Row) -> Option<&Phase>);

const PHASES: [PhaseOf; 2] = [("prefill", |row| row.prefill.as_ref()), ("decode", |row| row.decode.as_ref())];

/// From this ratio of the greatest to the least on, doublings of x are equally wide.
const WIDE: f64 = 4.0;

/// A chart for each phase and each variable that has several values: of capacity the speedup over dense, of depth, prompt and
/// batch the time per token. The other variables keep the first of their values. Where nothing else is swept there is one of
/// capacity in any case.
///
/// ```
/// use mindskip::bench::{Row, charts};
///
/// let file = std::fs::read("examples/bench.json").unwrap();
/// let rows: Vec<Row> = serde_json::from_slice(&file).unwrap();
/// let charts = charts(&rows);
/// let titles: Vec<_> = charts.iter().map(|chart| chart.title.split(',').next().unwrap()).collect();
/// assert_eq!(titles, ["prefill 64", "decode 8 behind 64"]);
/// assert_eq!(charts[0].lines[1].points, [(rows[1].active, rows[1].prefill.as_ref().unwrap().speedup)]);
/// ```
pub fn charts(rows: &[Row]) -> Vec<Chart> {
    let mut charts = Vec::new();
    for setting in distinct(rows.iter().map(|row| setting(&row.head))) {
        for (name, phase) in PHASES {
            let own = rows.iter().filter(|row| setting == self::setting(&row.head));
            let points: Vec<_> = own.filter_map(|row| Some(Point { row, phase: phase(row)? })).collect();
            let Some(&first) = points.first() else { continue };
            let several: Vec<_> =
                VARIABLES.into_iter().filter(|(_, of)| distinct(points.iter().map(|p| of(p.row))).len() > 1).collect();
            let capacities = distinct(points.iter().filter_map(|p| p.row.capacity.map(f64::to_bits)));
            if capacities.len() > 1 || several.is_empty() {
                charts.extend(by_capacity(&held(&points, first, None), name, &setting));
            }
            charts.extend(several.into_iter().map(|of| by(of, &held(&points, first, Some(of.0)), name, &setting)));
        }
    }
    charts
}

#[derive(Clone, Copy)]
struct Point<'a> {
    row: &'a Row,
    phase: &'a Phase,
}

/// Those of the first one's values but for one variable.
fn held<'a>(points: &[Point<'a>], first: Point, but: Option<&str>) -> Vec<Point<'a>> {
    let same = |p: &&Point| {
        let held = VARIABLES.into_iter().filter(|(name, _)| Some(*name) != but);
        held.map(|(_, of)| of).all(|of| of(p.row) == of(first.row)) && p.row.generated == first.row.generated
    };
    points.iter().filter(same).copied().collect()
}

/// Speedup over the active share, a pair of lines for each granularity and keys.
fn by_capacity(points: &[Point], phase: &str, setting: &str) -> Option<Chart> {
    let routed: Vec<_> = points.iter().filter(|p| p.row.routing != "dense").copied().collect();
    let first = routed.first()?;
    let mut lines = vec![Line { name: "dense".into(), points: vec![(0.0, 1.0), (1.0, 1.0)], pen: Pen::Base }];
    let x = |p: &Point| p.row.active;
    lines.extend(pairs(&routed, way, x, [|p| p.phase.speedup, |p| p.phase.ideal_speedup]));
    Some(Chart {
        title: title(phase, first, None, setting),
        x: "capacity: active share of tokens and routed layers".into(),
        y: "speedup over dense".into(),
        lines,
        ..Chart::default()
    })
}

/// Milliseconds per token over a variable, a pair of lines for each way to run.
fn by((name, of): Variable, points: &[Point], phase: &str, setting: &str) -> Chart {
    let x = |p: &Point| of(p.row) as f64;
    let measured: fn(&Point) -> f64 = |p| 1e3 / p.phase.tokens_per_s;
    let of_way = |row: &Row| match row.capacity {
        Some(capacity) => format!("{} {capacity}", way(row)),
        None => way(row),
    };
    let lines = pairs(points, of_way, x, [measured, |p| 1e3 / p.phase.tokens_per_s * p.phase.of_ideal]);
    let (least, most) = points.iter().map(x).fold((f64::INFINITY, 0.0), |(a, b), x| (x.min(a), x.max(b)));
    let what = match name {
        "batch" => "batch: sequences at a time",
        "depth" => "depth: tokens in the cache before",
        _ => "prompt: tokens that are read in one prefill",
    };
    Chart {
        title: title(phase, &points[0], Some(name), setting),
        x: what.into(),
        y: "ms per token".into(),
        lines,
        doublings: least > 0.0 && most >= WIDE * least,
        from_zero: true,
    }
}

/// For each name what was measured and its ideal, from left to right.
fn pairs(
    points: &[Point],
    name: impl Fn(&Row) -> String,
    x: impl Fn(&Point) -> f64,
    [measured, ideal]: [fn(&Point) -> f64; 2],
) -> Vec<Line> {
    let names = distinct(points.iter().map(|p| name(p.row)));
    let last = (names.len().max(2) - 1) as f64;
    let line = |i: usize, name_of: &str, y: fn(&Point) -> f64, pen: fn(f64) -> Pen| {
        let mut points: Vec<_> = points.iter().filter(|p| name(p.row) == names[i]).map(|p| (x(p), y(p))).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { name: name_of.into(), points, pen: pen(i as f64 / last) }
    };
    let all = (0..names.len()).map(|i| line(i, &names[i], measured, Pen::Few));
    all.chain((0..names.len()).map(|i| line(i, "ideal, of the same colour", ideal, Pen::Ideal))).collect()
}

/// "attn_token, active".
fn way(row: &Row) -> String {
    let keys = row.keys.as_ref().map_or(String::new(), |keys| format!(", {keys}"));
    format!("{}{keys}", row.routing)
}

fn title(phase: &str, of: &Point, but: Option<&str>, setting: &str) -> String {
    let Row { generated, depth, batch, prompt, .. } = of.row;
    let work = if phase == "decode" {
        let behind = if but == Some("prompt") || *prompt == 0 { String::new() } else { format!(" behind {prompt}") };
        format!("decode {generated}{behind}")
    } else if but == Some("prompt") {
        "prefill".into()
    } else {
        format!("prefill {prompt}")
    };
    let held = [("depth", depth), ("batch", batch)].into_iter().filter(|(name, _)| but != Some(name));
    let held: String = held.map(|(name, value)| format!(", {name} {value}")).collect();
    format!("{work}{held}: {setting}")
}

fn setting(head: &Head) -> String {
    let kernels = head.kernels.as_ref().map_or(String::new(), |kernels| format!(", kernels {kernels}"));
    format!("{}, {}, {}, K/V {}{kernels}", head.model, head.device, head.dtype, head.kv_dtype)
}

/// Each value once, in the order in which they first come.
fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut known = Vec::new();
    for value in values {
        if !known.contains(&value) {
            known.push(value);
        }
    }
    known
}
