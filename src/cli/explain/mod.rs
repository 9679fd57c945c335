//! `mindskip explain`.

mod page;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use mindskip::engine::LayerTrace;
use mindskip::tokenizer::Tokenizer;
use mindskip::{Result, plot};
use serde_json::{Value, json};

use super::args::{ModelArgs, RoutingArgs, RunArgs};
use super::generate::{read_stdin, read_text, too_long, without_last_newline};
use super::progress::catch_interrupts;
use super::score::trace_json;
use super::show::{Usage, routing_line, visible};
use super::{Outcome, Ran, bad, print_json};

/// A text, each token shaded by how many routed layers it passed
///
/// Where no colours can be shown: a line for each token, with a mark for each routed layer.
#[derive(Args)]
pub struct Explain {
    #[command(flatten)]
    input: Input,
    #[command(flatten)]
    model: ModelArgs,
    /// Also writes a page with the score of every token in every routed layer.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// One JSON object: tokens with their texts and the layers they passed; layers with scores.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    routing: RoutingArgs,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Args)]
#[group(multiple = false)]
struct Input {
    /// A text; without any, standard input's.
    #[arg(value_name = "TEXT")]
    given: Option<String>,
    /// The same, for a text that begins with a dash.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Option<String>,
    /// A text file.
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Token ids: 1,2,3.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
}

impl Input {
    fn tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let text = match self {
            Input { ids: Some(ids), .. } => return Ok(ids.clone()),
            Input { given: Some(text), .. } | Input { text: Some(text), .. } => text.clone(),
            Input { file: Some(path), .. } => without_last_newline(read_text(path)?),
            _ => without_last_newline(read_stdin()?),
        };
        if text.is_empty() { Ok(Vec::new()) } else { tokenizer.encode(&text, true) }
    }
}

/// A token, and what became of it.
struct Token {
    id: u32,
    /// That became certain by it: none for the beginning of a character, all of it for the end.
    text: String,
    /// How many routed layers it passed.
    passed: usize,
}

/// A text on its way through the routed layers.
struct Report {
    model: String,
    routing: String,
    tokens: Vec<Token>,
    traces: Vec<LayerTrace>,
    usage: Usage,
}

impl Explain {
    pub fn run(self) -> Ran {
        let bundle = self.model.load()?;
        let Some(routing) = self.routing.routing(&bundle)?.filter(|routing| !routing.layers.is_empty()) else {
            return Ok(bad("nothing is routed, every token passes every layer", "give --routers FILE or --capacity")?);
        };
        let tokenizer = bundle.tokenizer()?;
        let ids = self.input.tokens(&tokenizer)?;
        if ids.is_empty() {
            return Ok(bad("there is nothing to explain", "give at least one token")?);
        }
        let room = self.run.context.unwrap_or(bundle.config.context);
        if ids.len() > room {
            return Err(too_long(ids.len(), room).into());
        }
        // From here on; until now ^C ends the program, also while it waits for standard input.
        let _noted = catch_interrupts();
        let model = bundle.name.clone();
        let mut engine = self.run.engine(bundle, Some(routing), 1, ids.len(), ids.len())?;
        let seq = engine.open()?;
        engine.prefill(&[(seq, &ids)])?;
        let traces = engine.trace()?;
        let report = Report {
            model,
            routing: routing_line(engine.routing()),
            tokens: tokens(&tokenizer, &ids, &traces)?,
            traces,
            usage: Usage::of(&mut engine)?,
        };
        if let Some(path) = &self.html {
            plot::save(&page::of(&report), path)?;
        }
        if self.json {
            print_json(&report.json())?;
        } else {
            report.print(&mut io::stdout().lock(), colours())?;
        }
        Ok(Outcome::Done)
    }
}

/// Whether a token passed, and its score: the sequence's where it was decided as a whole.
fn at(trace: &LayerTrace, token: usize) -> (bool, f32) {
    let entry = if trace.active.len() == 1 { 0 } else { token };
    (trace.active[entry], trace.scores[entry])
}

fn tokens(tokenizer: &Tokenizer, ids: &[u32], traces: &[LayerTrace]) -> Result<Vec<Token>> {
    let mut stream = tokenizer.stream(false);
    let mut all = Vec::with_capacity(ids.len());
    for (i, &id) in ids.iter().enumerate() {
        let passed = traces.iter().filter(|trace| at(trace, i).0).count();
        all.push(Token { id, text: stream.push(id)?, passed });
    }
    if let Some(last) = all.last_mut() {
        last.text += &stream.finish()?;
    }
    Ok(all)
}

/// Whether standard output shows colours: <https://no-color.org>.
fn colours() -> bool {
    let no = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    io::stdout().is_terminal() && !no && !dumb
}

/// A token's text as a name of it, in one line.
fn label(text: &str) -> String {
    if text.is_empty() {
        "…".into()
    } else {
        visible(text).replace('\n', "⏎").replace('\t', "⇥").replace(' ', "␣")
    }
}

/// From skipped to passed, among the 256 colours of terminals; and how many of them take black letters.
const SHADES: [u8; 7] = [231, 195, 153, 111, 69, 26, 18];
const LIGHT: usize = 4;

/// Begins the shade of `passed` of `all` layers.
fn shade(passed: usize, all: usize) -> String {
    let nth = passed * (SHADES.len() - 1) / all;
    format!("\x1b[38;5;{};48;5;{}m", if nth < LIGHT { 16 } else { 231 }, SHADES[nth])
}
const PLAIN: &str = "\x1b[0m";

impl Report {
    fn capacity(&self, trace: &LayerTrace) -> f64 {
        self.usage.activity.capacity(trace.layer)
    }

    fn print(&self, out: &mut dyn Write, colours: bool) -> io::Result<()> {
        writeln!(out, "{}: {}", visible(&self.model), self.routing)?;
        if colours {
            self.print_shaded(out)?
        } else {
            self.print_marks(out)?
        }
        writeln!(out, "\ncapacity {:.1}% of the routed layers", self.usage.capacity() * 100.0)?;
        self.usage.print_layers(out)
    }

    fn print_shaded(&self, out: &mut dyn Write) -> io::Result<()> {
        let all = self.traces.len();
        write!(out, "passed")?;
        for passed in 0..=all {
            write!(out, " {} {passed} {PLAIN}", shade(passed, all))?;
        }
        write!(out, " of {all} routed layers\n\n")?;
        for token in &self.tokens {
            let on = shade(token.passed, all);
            // The rest of a line, and what a tab jumps over, would take the colour, too.
            let text = visible(&token.text).replace('\t', "    ").replace('\n', &format!("{PLAIN}\n{on}"));
            write!(out, "{on}{text}{PLAIN}")?;
        }
        writeln!(out)
    }

    fn print_marks(&self, out: &mut dyn Write) -> io::Result<()> {
        let all = self.traces.len();
        writeln!(out, "\n passed  by layer  token")?;
        for (i, token) in self.tokens.iter().enumerate() {
            let marks: String = self.traces.iter().map(|trace| if at(trace, i).0 { '█' } else { '░' }).collect();
            let passed = format!("{}/{all}", token.passed);
            writeln!(out, "{passed:>7}  {marks:<8}  {}", label(&token.text))?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let token = |t: &Token| json!({"id": t.id, "text": t.text, "passed": t.passed});
        let layer = |trace: &LayerTrace| {
            let mut value = trace_json(trace.clone());
            value["capacity"] = self.capacity(trace).into();
            value
        };
        json!({
            "model": self.model,
            "routing": self.routing,
            "capacity": self.usage.capacity(),
            "tokens": self.tokens.iter().map(token).collect::<Vec<_>>(),
            "layers": self.traces.iter().map(layer).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use mindskip::bundle::Bundle;
    use mindskip::engine::{Engine, Options};
    use mindskip::model::Routing;

    use super::*;

    /// By the embedded model.
    fn report(text: &str) -> Report {
        let bundle = Bundle::embedded().unwrap();
        let tokenizer = bundle.tokenizer().unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        let routing = bundle.routers.clone().map(Routing::routers);
        let mut engine = Engine::new(bundle.config, bundle.weights, routing, &Options::default()).unwrap();
        let seq = engine.open().unwrap();
        engine.prefill(&[(seq, &ids)]).unwrap();
        let traces = engine.trace().unwrap();
        let tokens = tokens(&tokenizer, &ids, &traces).unwrap();
        let usage = Usage::of(&mut engine).unwrap();
        Report { model: "a <b> \x1b[2J".into(), routing: "attn_token".into(), tokens, traces, usage }
    }

    const HOSTILE: &str =
        "\x1b[2J\u{9b}31m</style><script>alert('1')</script>\"&amp;\u{202e}\u{7}\r\nend\t\u{1f469}\u{200d}\u{1f680}é";

    fn printed(report: &Report, colours: bool) -> String {
        let mut out = Vec::new();
        report.print(&mut out, colours).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// The only escapes are shades, which end with their line.
    #[test]
    fn terminals_get_shades_and_nothing_else() {
        let text = printed(&report(HOSTILE), true);
        let mut bare = String::new();
        for line in text.lines() {
            let mut shaded = false;
            let mut parts = line.split("\x1b[");
            bare += parts.next().unwrap();
            for part in parts {
                let (code, rest) = part.split_once('m').unwrap();
                shaded = code != "0";
                assert!(!shaded || code.starts_with("38;5;") && code.contains(";48;5;"), "{code}");
                bare += rest;
            }
            assert!(!shaded, "{line:?}");
            bare.push('\n');
        }
        assert!(bare.chars().all(|c| c == '\n' || !c.is_control()) && !bare.contains('\u{202e}'), "{bare:?}");
        let whole = "\\u{1b}[2J\\u{9b}31m</style><script>alert('1')</script>\"&amp;\\u{202e}\\u{7}\\u{d}\nend    \u{1f469}\u{200d}\u{1f680}é\n";
        assert!(bare.contains(whole), "{bare}");
        let plain = printed(&report(HOSTILE), false);
        assert!(plain.chars().all(|c| c == '\n' || !c.is_control()), "{plain:?}");
    }

    /// Shades go from the lightest to the darkest, in steps that do not depend on the number of layers.
    #[test]
    fn more_layers_are_darker() {
        for all in [1, 5, 6, 30] {
            let shades: Vec<_> = (0..=all).map(|passed| shade(passed, all)).collect();
            assert!(shades[0].contains(";231m") && shades[all].contains(";18m"), "{shades:?}");
        }
    }

    /// Every tag is closed, no text is one, and nothing is fetched or run.
    #[test]
    fn the_page_is_well_formed() {
        let report = report(HOSTILE);
        let page = page::of(&report);
        let (mut open, mut rest) = (Vec::new(), page.strip_prefix("<!DOCTYPE html>").unwrap());
        let mut cells = 0;
        while let Some(at) = rest.find('<') {
            let end = rest[at..].find('>').unwrap() + at;
            let tag = &rest[at + 1..end];
            assert!(!tag.contains('<') && tag.matches('"').count() % 2 == 0, "{tag}");
            match (tag.strip_prefix('/'), tag.split(' ').next().unwrap()) {
                (Some(name), _) => assert_eq!(open.pop(), Some(name)),
                (_, "meta") => {}
                (_, name) => {
                    let known = ["html", "head", "title", "style", "body", "h1", "p", "div", "a", "bdi", "span"];
                    let table = ["table", "thead", "tbody", "tr", "th", "td", "b"];
                    assert!(known.contains(&name) || table.contains(&name), "{tag}");
                    open.push(name);
                    cells += usize::from(name == "td");
                }
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "{open:?}");
        assert_eq!(cells, report.tokens.len() * report.traces.len());
        assert!(!page.contains("http:") && !page.contains("https:") && !page.contains("url("));
        assert!(page.chars().all(|c| matches!(c, '\n' | '\t') || !c.is_control()) && !page.contains('\u{202e}'));
    }
}
