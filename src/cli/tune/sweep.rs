//! `--sweep`: routers for several capacities, and what each costs and buys.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use mindskip::bench::{Ideal, Text, ideal};
use mindskip::engine::{self, Device, Engine, Options};
use mindskip::model::Routing;
use mindskip::plot::{self, Chart, Line, Pen};
use mindskip::router::{RouterSet, Select};
use mindskip::tune::Sample;
use mindskip::tune::train::{Evaluation, TrainSettings};
use mindskip::{Error, Result};
use serde::Serialize;
use serde_json::json;

use super::super::{Outcome, Ran, bad, print_json};
use super::layers::Measured;
use super::{Base, Tune, beside, each_threshold};

/// Held-out samples that speedups are predicted on, and the tokens of each that are decoded at most.
const TEXTS: usize = 8;
const DECODED: usize = 16;

/// Capacities, descending.
#[derive(Debug, Clone)]
pub struct Targets(Vec<f32>);

impl FromStr for Targets {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let mut targets = Vec::new();
        for part in text.split(',') {
            match part.trim().parse::<f32>() {
                Ok(target) if (0.0..=1.0).contains(&target) => targets.push(target),
                _ => return bad(format!("{part:?} is no capacity"), "give shares from 0 to 1, such as 0.9,0.75,0.5"),
            }
        }
        targets.sort_by(|a, b| b.total_cmp(a));
        match targets.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => bad(format!("{} is there twice", pair[0]), "give each capacity once"),
            None => Ok(Targets(targets)),
        }
    }
}

/// What came of a target. Speedups are those of the ideals, over the dense model.
#[derive(Serialize)]
struct Point {
    target: f64,
    routers: PathBuf,
    thresholds: Vec<f32>,
    /// On held-out samples.
    capacity: f64,
    loss: f64,
    change: f64,
    prefill_speedup: f64,
    decode_speedup: f64,
}

impl Tune {
    /// Trains for one target after the other, each as a run of its own would.
    pub(super) fn sweep(&self, base: &Base, targets: &Targets) -> Ran {
        let held_out = match base.val.first() {
            Some(data) => data.samples.clone(),
            None => base.settings.split(base.data.samples.clone())?.1,
        };
        if held_out.is_empty() {
            return Ok(bad("no samples are held out to compare on", "raise --val-split")?);
        }
        let (mut dense, mut trained) = (None, Vec::new());
        for (n, &target) in targets.0.iter().enumerate() {
            let mut settings = TrainSettings { target, ..base.settings.clone() };
            if settings.router.select == Select::TopK {
                settings.router.capacity = target;
            }
            settings.check()?;
            let output = of_target(&self.output, target);
            eprintln!("capacity {target}, {} of {}", n + 1, targets.0.len());
            let mut trainer = self.trainer(base, settings)?;
            let checkpoint = beside(&output, "checkpoint");
            // ^C may have come before the later ones began.
            if self.resume && (n == 0 || checkpoint.exists()) {
                trainer.resume(&checkpoint)?;
            }
            if dense.is_none() {
                dense = self.dense(&mut trainer)?;
            }
            match self.train(&mut trainer, &output, dense)? {
                Some(done) => trained.push((target, output, done)),
                None => return Ok(Outcome::Interrupted),
            }
        }
        let sets: Vec<_> = trained.iter().map(|(_, _, done)| &done.set).collect();
        let (dense_ideal, ideals) = self.ideals(base, &sets, &held_out)?;
        let dense = dense.expect("samples are held out");
        let points = trained.iter().zip(ideals).map(|((target, output, done), own)| {
            let Evaluation { loss, capacity } = done.routed.expect("samples are held out");
            Point {
                // 0.9 as it was written, not as f32 holds it.
                target: (f64::from(*target) * 1e6).round() / 1e6,
                routers: output.clone(),
                thresholds: each_threshold(&done.set),
                capacity,
                loss,
                change: loss - dense.loss,
                prefill_speedup: dense_ideal.prefill / own.prefill,
                decode_speedup: dense_ideal.decode / own.decode,
            }
        });
        let points: Vec<Point> = points.collect();
        let json = json!({
            "granularity": self.what.granularity.to_string(),
            "layers": base.layers,
            "measured": base.measured.as_ref().map(Measured::json),
            "dense": dense,
            "points": points,
        });
        plot::save(&json.to_string(), &beside(&self.output, "json"))?;
        plot::save(&plot::lines(&self.charts(&points, dense))?, &beside(&self.output, "svg"))?;
        if self.json {
            print_json(&json)?
        } else {
            show(&points, dense)?
        }
        Ok(Outcome::Done)
    }

    /// What the dense model takes at best on some of the samples, and what it takes with each set of routers.
    fn ideals(&self, base: &Base, sets: &[&RouterSet], samples: &[Sample]) -> Result<(Ideal, Vec<Ideal>)> {
        let texts = samples.iter().take(TEXTS).map(|sample| {
            let prompt = sample.answers().next().map_or(1, |(row, _)| row as usize + 1);
            Text { ids: sample.inputs(), prompt, decoded: DECODED }
        });
        let texts: Vec<Text> = texts.collect();
        let options = Options {
            device: Device::Cpu,
            threads: self.threads,
            context: texts.iter().map(|text| text.ids.len()).max(),
            memory: self.memory,
            ..Options::default()
        };
        let (weights, config) = (&base.bundle.weights, &base.bundle.config);
        let rates = engine::rates(&options, weights.main_dtype())?.1;
        let routings: Vec<_> = sets.iter().map(|&set| Routing::routers(set.clone())).collect();
        let mut engine = Engine::new(config.clone(), weights.clone(), routings.first().cloned(), &options)?;
        engine.reroute(None)?;
        let dense = ideal(&mut engine, &rates, &texts)?;
        let each = routings.into_iter().map(|routing| {
            engine.reroute(Some(routing))?;
            ideal(&mut engine, &rates, &texts)
        });
        Ok((dense, each.collect::<Result<_>>()?))
    }

    fn charts(&self, points: &[Point], dense: Evaluation) -> [Chart; 2] {
        let line = |name: &str, pen, of: &dyn Fn(&Point) -> f64, dense: f64| {
            let points = points.iter().map(|point| (point.capacity, of(point)));
            Line { name: name.into(), points: std::iter::once((1.0, dense)).chain(points).collect(), pen }
        };
        let chart = |title: String, y: &str, lines| Chart {
            title,
            x: "capacity".into(),
            y: y.into(),
            lines,
            ..Chart::default()
        };
        let title = format!("{}, held out", self.what.granularity);
        [
            chart(
                title,
                "loss",
                vec![
                    line("dense", Pen::Base, &|_| dense.loss, dense.loss),
                    line("routed", Pen::Main, &|point| point.loss, dense.loss),
                ],
            ),
            chart(
                "predicted, by bytes and FLOPs".into(),
                "speedup over dense",
                vec![
                    line("prefill", Pen::Ideal(0.0), &|point| point.prefill_speedup, 1.0),
                    line("decode", Pen::Ideal(1.0), &|point| point.decode_speedup, 1.0),
                ],
            ),
        ]
    }
}

/// `routers.safetensors` for 0.75 is `routers-0.75.safetensors`.
fn of_target(output: &Path, target: f32) -> PathBuf {
    let mut name = output.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{target}"));
    if let Some(extension) = output.extension() {
        name.push(".");
        name.push(extension);
    }
    output.with_file_name(name)
}

fn show(points: &[Point], dense: Evaluation) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "                                          predicted speedup")?;
    writeln!(out, "target   capacity     loss    change      prefill    decode")?;
    writeln!(out, "dense      100.0%   {:.4}", dense.loss)?;
    for p in points {
        let (capacity, prefill, decode) = (p.capacity * 100.0, p.prefill_speedup, p.decode_speedup);
        let (target, loss, change, file) = (p.target, p.loss, p.change, p.routers.display());
        writeln!(
            out,
            "{target:<8}   {capacity:5.1}%   {loss:.4}   {change:+.4}       {prefill:5.2}x    {decode:5.2}x   {file}"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacities_are_sorted_and_checked() {
        let targets = |text: &str| text.parse::<Targets>().map(|targets| targets.0);
        assert_eq!(targets("0.5, 0.9,0.75").unwrap(), [0.9, 0.75, 0.5]);
        assert_eq!(targets("1").unwrap(), [1.0]);
        for wrong in ["", ",", "0.5,", "NaN", "inf", "1.5", "-0.1", "0.5,0.50", "half", "0.5;0.4"] {
            assert!(targets(wrong).unwrap_err().to_string().contains("; give "), "{wrong}");
        }
    }

    #[test]
    fn files_are_named_by_their_capacity() {
        let of = |path: &str| of_target(Path::new(path), 0.75);
        assert_eq!(of("a/routers.safetensors"), Path::new("a/routers-0.75.safetensors"));
        assert_eq!(of("routers"), Path::new("routers-0.75"));
    }
}
