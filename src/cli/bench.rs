//! `mindskip bench`.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mindskip::bench::{
    Compared, Format, Lines, OpsPlan, PaperPlan, Plan, Progress, Saved, Setting, Subject, Verdict, Way, charts,
    compare, measure, measure_ops, measure_paper, save, write,
};
use mindskip::bundle::{Bundle, EMBEDDED};
use mindskip::config::Config;
use mindskip::engine::{Device, Kernels, Precision};
use mindskip::memory::{Budget, parse_budget};
use mindskip::model::{Gates, Routing};
use mindskip::router::{Granularity, Keys, LayerSpec, Level, RouterSet, RouterSettings, Target};
use mindskip::tensor::DType;
use mindskip::{Kind, Result, plot};

use super::progress::{catch_interrupts, interrupted};
use super::{Failure, Outcome, Ran, bad};

/// Measures what skipping buys: dense and routed runs in turns, beside what the machine could do at best
///
/// Lists are swept: --capacity 1,0.5 --prompt 128,512 measures all four. Without options: the embedded model with random
/// masks of a few capacities.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Bench {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    sweep: Sweep,
}

#[derive(Subcommand)]
enum What {
    Ops(Ops),
    Compare(Compare),
    Paper(Paper),
}

#[derive(Args)]
struct Sweep {
    #[command(flatten)]
    on: On,
    /// Random masks with these shares active.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1.0, 0.75, 0.5, 0.25, 0.0],
        allow_negative_numbers = true, help_heading = "Routing")]
    capacity: Vec<f32>,
    /// Trained routers in place of random masks.
    #[arg(long, value_name = "FILE", conflicts_with = "capacity", help_heading = "Routing")]
    routers: Option<PathBuf>,
    /// What is skipped, and what decides: attn_token …; "all" for the six. attn_token, or as the routers say.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = granularities, help_heading = "Routing")]
    granularity: Vec<Granularities>,
    /// Whose keys and values a routed layer holds: all, active. All, or as the routers say.
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Routing")]
    keys: Vec<Keys>,
    /// Routed layers: last:N (before the final one), all, 3-9, 1,2,5. The upper half, or those of the routers.
    #[arg(long, help_heading = "Routing")]
    layers: Option<LayerSpec>,
    /// Tokens that are read in one prefill; 0 for none.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [256], help_heading = "Work")]
    prompt: Vec<usize>,
    /// Tokens that are decoded; 0 for none.
    #[arg(long = "gen", value_name = "LIST", value_delimiter = ',', default_values_t = [64], help_heading = "Work")]
    generated: Vec<usize>,
    /// Tokens that are in the cache before.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [0], help_heading = "Work")]
    depth: Vec<usize>,
    /// Sequences at a time.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1], help_heading = "Work")]
    batch: Vec<usize>,
    /// Rounds that are not counted.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Work")]
    warmup: usize,
    /// Rounds that are.
    #[arg(long, value_name = "N", default_value_t = 5, help_heading = "Work")]
    reps: usize,
    /// Of token ids and masks.
    #[arg(long, default_value_t = 0, help_heading = "Work")]
    seed: u64,
    /// Charts as SVG, with the ideal dashed: speedup over capacity, and time per token over each of --depth, --prompt and --batch
    /// that lists several values. In a chart the other lists keep their first value.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    plot: Option<PathBuf>,
}

/// Measures every op by itself: of a forward pass as an engine runs it, and of the backward pass of Router-Tuning in f32
#[derive(Args)]
struct Ops {
    #[command(flatten)]
    on: On,
    /// Rows at a time: 1 is a decode step, more are prompts.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1, 256])]
    rows: Vec<usize>,
    /// Tokens of the sequence, with those of the step.
    #[arg(long, value_name = "N", default_value_t = 512)]
    context: usize,
    /// Samples of each.
    #[arg(long, value_name = "N", default_value_t = 7)]
    reps: usize,
}

/// Compares two saved results, JSON or JSON lines of a sweep, of ops or of the paper's table
///
/// Tests are found by what was measured: test, routing, keys, capacity, batch, depth, and every setting (device, dtype, threads …)
/// of which a result has several. Other settings that differ are told. A test is "slower" or "faster" when two things hold: the
/// rank test of Mann and Whitney over the times of all repetitions, two-sided, gives less than 1% to chance, for which it takes
/// five repetitions on both sides, and the medians differ by --least.
#[derive(Args)]
struct Compare {
    /// The result to compare with.
    a: PathBuf,
    /// The new one.
    b: PathBuf,
    /// The least change of a median that counts, as a share.
    #[arg(long, value_name = "SHARE", default_value_t = 0.03, allow_negative_numbers = true)]
    least: f64,
    /// Exit code 1 when something got slower, or nothing could be compared.
    #[arg(long)]
    fail_slower: bool,
    #[command(flatten)]
    out: Out,
}

/// Measures the paper's speed column: Llama-3-8B's shape, 16 layers routed, capacity 0.5, all six granularities
///
/// Beside ours stand the ideal and the figure of the paper (He et al., arXiv 2410.13184v1, Table 1), which names what is skipped
/// and no lengths. Where the memory does not suffice all widths are divided by 2, 4 or 8, which the output says.
#[derive(Args)]
struct Paper {
    #[command(flatten)]
    machine: Machine,
    /// Divides all widths by 1, 2, 4 or 8; by as little as the memory allows when nothing is given.
    #[arg(long, value_name = "N")]
    scale: Option<usize>,
    /// Tokens that are read in one prefill; 0 for none.
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens that are decoded; 0 for none.
    #[arg(long = "gen", value_name = "N", default_value_t = 64)]
    generated: usize,
    /// Tokens that are in the cache before.
    #[arg(long, value_name = "N", default_value_t = 0)]
    depth: usize,
    /// Sequences at a time.
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
    /// Rounds that are not counted.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: usize,
    /// Rounds that are.
    #[arg(long, value_name = "N", default_value_t = 5)]
    reps: usize,
    /// Of token ids and masks.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    out: Out,
}

/// What to measure, where, and how to write it.
#[derive(Args)]
struct On {
    /// The embedded model, the folder of a Hugging Face model, or its id on the hub (org/name).
    #[arg(short, long, default_value = EMBEDDED, value_name = "NAME")]
    model: String,
    /// A well-known model's shape with random weights, which are made on the device: llama-3-8b, mistral-7b, qwen2.5-7b,
    /// qwen2.5-1.5b, smollm2-135m, llama-3.2-1b.
    #[arg(long, value_name = "NAME", value_parser = shape, conflicts_with = "model")]
    shape: Option<Shape>,
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    out: Out,
}

/// Where to measure.
#[derive(Args)]
struct Machine {
    /// Where to run: cpu, cuda, cuda:N, or auto, which is the first GPU if there is one.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "auto", help_heading = "Machine")]
    device: Vec<Device>,
    /// f32, f16 or bf16 for weights, on a GPU also for activations; bf16, or as the model is stored.
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Machine")]
    dtype: Vec<DType>,
    /// f32, f16 or bf16 for K/V; as the activations when nothing is given, which are f32 on the CPU.
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Machine")]
    kv_dtype: Vec<DType>,
    /// CPU threads; as many as there are cores when nothing is given.
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "Machine")]
    threads: Vec<usize>,
    /// On the CPU, what bf16 weights are multiplied with: f32 inputs, or inputs rounded to bf16.
    #[arg(long, default_value = "f32", help_heading = "Machine")]
    precision: Precision,
    /// On a GPU, where an op has several kernels: auto, sm80 or hopper.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "auto", help_heading = "Machine")]
    kernels: Vec<Kernels>,
    /// What weights, activations and K/V may take together on the device, such as 8G or 90%.
    #[arg(long, value_name = "SIZE", value_parser = parse_budget, help_heading = "Machine")]
    memory: Option<Budget>,
}

/// How to write what was measured.
#[derive(Args)]
struct Out {
    /// md, csv, json, or jsonl with a line for each row as it is measured.
    #[arg(long, default_value = "md", help_heading = "Output")]
    format: Format,
    /// Written when all is measured, in place of standard output.
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
}

#[derive(Debug, Clone)]
struct Shape {
    name: String,
    config: Config,
}

fn shape(text: &str) -> Result<Shape> {
    mindskip::bench::shape(text).map(|config| Shape { name: text.into(), config })
}

#[derive(Debug, Clone)]
struct Granularities(Vec<Granularity>);

fn granularities(text: &str) -> Result<Granularities> {
    let names = if text == "all" { &Granularity::NAMES[..] } else { &[text] };
    names.iter().map(|name| name.parse()).collect::<Result<_>>().map(Granularities)
}

impl On {
    fn subject(&self) -> Result<(Subject, Option<RouterSet>)> {
        if let Some(Shape { name, config }) = &self.shape {
            return Ok((Subject::shape(name, config.clone()), None));
        }
        let bundle = Bundle::load(&self.model)?;
        let routers = bundle.routers.clone();
        Ok((Subject::model(bundle), routers))
    }
}

impl Machine {
    /// Every combination.
    fn settings(&self) -> Vec<Setting> {
        let mut settings = Vec::new();
        for &device in &self.device {
            for dtype in each(&self.dtype) {
                for kv_dtype in each(&self.kv_dtype) {
                    let runs = each(&self.threads).flat_map(|threads| self.kernels.iter().map(move |&k| (threads, k)));
                    settings.extend(runs.map(|(threads, kernels)| Setting {
                        device,
                        dtype,
                        kv_dtype,
                        threads,
                        precision: self.precision,
                        kernels,
                        memory: self.memory,
                    }));
                }
            }
        }
        settings
    }
}

impl Out {
    /// Runs a measurement that hands rows over as they come, and writes them. What was measured before ^C is written too.
    fn write<R: Lines>(
        &self,
        run: impl FnOnce(&mut dyn FnMut(&Progress) -> ControlFlow<()>, &mut dyn FnMut(Vec<R>)) -> Result<()>,
    ) -> std::result::Result<(Vec<R>, Outcome), Failure> {
        let _noted = catch_interrupts();
        let at_once = self.format == Format::Jsonl && self.output.is_none();
        let (mut rows, mut written) = (Vec::new(), Ok(()));
        let mut shown = Shown::new();
        let result = run(&mut |progress| shown.tell(progress), &mut |more| {
            if at_once && written.is_ok() {
                written = write(self.format, &more, &mut io::stdout().lock());
            }
            rows.extend(more);
        });
        drop(shown);
        written?;
        let outcome = match result {
            Err(e) if e.kind() == Kind::Interrupted => Outcome::Interrupted,
            result => result.map(|()| Outcome::Done)?,
        };
        if !at_once {
            self.put(&rows)?;
        }
        Ok((rows, outcome))
    }

    fn put<R: Lines>(&self, rows: &[R]) -> std::result::Result<(), Failure> {
        if let Some(path) = &self.output {
            return Ok(save(self.format, rows, path)?);
        }
        let mut out = io::stdout().lock();
        write(self.format, rows, &mut out)?;
        Ok(out.flush()?)
    }
}

/// What was listed; when nothing was, the one thing that stands for it.
fn each<T: Copy>(list: &[T]) -> impl Iterator<Item = Option<T>> {
    let none = if list.is_empty() { Some(None) } else { None };
    list.iter().copied().map(Some).chain(none)
}

impl Bench {
    pub fn run(self) -> Ran {
        match self.what {
            Some(What::Ops(ops)) => ops.run(),
            Some(What::Compare(compare)) => compare.run(),
            Some(What::Paper(paper)) => paper.run(),
            None => self.sweep.run(),
        }
    }
}

impl Ops {
    fn run(self) -> Ran {
        let Ops { on, rows, context, reps } = self;
        let (subject, _) = on.subject()?;
        let context = context.min(subject.config.context);
        let plans = on.machine.settings().into_iter().map(|setting| OpsPlan {
            subject: subject.clone(),
            setting,
            rows: rows.clone(),
            context,
            reps,
        });
        let plans: Vec<_> = plans.collect();
        on.out
            .write(|progress, each| plans.iter().try_for_each(|plan| measure_ops(plan, progress, each)))
            .map(|(_, outcome)| outcome)
    }
}

impl Compare {
    fn run(self) -> Ran {
        let Compare { a, b, least, fail_slower, out } = self;
        if !least.is_finite() || least < 0.0 {
            return Ok(bad(format!("--least is {least}"), "give a share such as 0.03")?);
        }
        let Compared { rows, differences } = compare(&Saved::open(&a)?, &Saved::open(&b)?, least);
        for difference in differences {
            eprintln!("mindskip: warning: A and B differ in {difference}");
        }
        let compared = rows.iter().any(|row| row.ratio.is_some() && row.verdict != Verdict::TooFew);
        if !compared {
            eprintln!("mindskip: warning: nothing was measured in both with five repetitions or more");
        }
        out.put(&rows)?;
        let slower = rows.iter().any(|row| row.verdict == Verdict::Slower);
        Ok(if fail_slower && (slower || !compared) { Outcome::Failed } else { Outcome::Done })
    }
}

impl Paper {
    fn run(self) -> Ran {
        let Paper { machine, scale, prompt, generated, depth, batch, warmup, reps, seed, out } = self;
        let settings = machine.settings();
        let plan = PaperPlan { settings, scale, batch, depth, prompt, generated, warmup, reps, seed };
        out.write(|progress, each| measure_paper(&plan, progress, each)).map(|(_, outcome)| outcome)
    }
}

impl Sweep {
    fn run(self) -> Ran {
        let (subject, own) = self.on.subject()?;
        let routers = match &self.routers {
            // The embedded model's own have a name, as in the other commands' default.
            Some(path) if path.as_os_str() == EMBEDDED && own.is_some() => own,
            Some(path) => Some(RouterSet::open(path)?),
            None => None,
        };
        let mut ways = vec![Way::DENSE];
        ways.extend(self.ways(&subject.config, routers)?);
        let plan = Plan {
            subject,
            settings: self.on.machine.settings(),
            batches: self.batch,
            depths: self.depth,
            prompts: self.prompt,
            generated: self.generated,
            ways,
            warmup: self.warmup,
            reps: self.reps,
            seed: self.seed,
        };
        plan.check()?;
        let (rows, outcome) = self.on.out.write(|progress, each| measure(&plan, progress, each))?;
        match &self.plot {
            Some(path) if !rows.is_empty() => plot::save(&plot::lines(&charts(&rows))?, path)?,
            _ => {}
        }
        Ok(outcome)
    }

    /// The routed ways: every combination of granularity, keys and capacity that differs from the others.
    fn ways(&self, config: &Config, routers: Option<RouterSet>) -> Result<Vec<Way>> {
        if let Some(wrong) = self.capacity.iter().find(|share| !(0.0..=1.0).contains(*share)) {
            return bad(format!("--capacity is {wrong}"), "give shares from 0 to 1");
        }
        let base = routers.as_ref().map_or_else(RouterSettings::default, |set| set.settings);
        let layers = match (&self.layers, &routers) {
            (Some(spec), _) => spec.resolve(config.layers)?,
            (None, Some(set)) => set.weights.keys().copied().collect(),
            (None, None) => {
                LayerSpec::Last(config.layers.div_ceil(2).min(config.layers - 1).max(1)).resolve(config.layers)?
            }
        };
        let named: Vec<_> = self.granularity.iter().flat_map(|list| &list.0).copied().collect();
        let mut ways = Vec::new();
        for granularity in each(&named).map(|named| named.unwrap_or(base.granularity)) {
            let choice = granularity.level == Level::Token && granularity.target != Target::Mlp;
            for keys in each(&self.keys).take(if choice { usize::MAX } else { 1 }) {
                let settings = RouterSettings { granularity, keys: keys.unwrap_or(base.keys), ..base };
                let way = |gates| Way { routing: Some(Routing { settings, layers: layers.clone(), gates }) };
                match &routers {
                    Some(set) => ways.push(way(Gates::Routers(set.clone()))),
                    None => ways
                        .extend(self.capacity.iter().map(|&capacity| way(Gates::Random { capacity, seed: self.seed }))),
                }
            }
        }
        Ok(ways)
    }
}

/// A bar on a terminal, now and then a line elsewhere.
struct Shown {
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Shown {
    /// Between two lines.
    const LINES: Duration = Duration::from_secs(5);

    fn new() -> Shown {
        let target = ProgressDrawTarget::stderr();
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {eta} {msg}").expect("a fixed template");
        let bar = (!target.is_hidden()).then(|| ProgressBar::with_draw_target(Some(1), target).with_style(style));
        Shown { bar, said: Instant::now() }
    }

    fn tell(&mut self, progress: &Progress) -> ControlFlow<()> {
        let Progress { done, all, now } = progress;
        match &self.bar {
            Some(bar) => {
                bar.set_length(*all as u64);
                bar.set_position(*done as u64);
                bar.set_message(now.clone());
            }
            None if self.said.elapsed() > Self::LINES => {
                eprintln!("{done} of {all}: {now}");
                self.said = Instant::now();
            }
            None => {}
        }
        if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.bar.take().inspect(ProgressBar::finish_and_clear);
    }
}
