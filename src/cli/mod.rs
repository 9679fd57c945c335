//! What a user types: the commands and the arguments they share.

mod args;
mod bench;
mod chat;
mod demo;
mod doctor;
mod eval;
mod explain;
mod generate;
mod inspect;
mod progress;
mod score;
mod show;
mod tune;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mindskip::{Error, Kind, Result};

/// Runs language models whose tokens and sequences skip layers, and shows what that saves.
///
/// Without a command: the embedded model tells a story three times, with its full depth and with its routers.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Generate(generate::Generate),
    Chat(chat::Chat),
    Score(score::Score),
    Explain(explain::Explain),
    Inspect(inspect::Inspect),
    Bench(Box<bench::Bench>),
    Eval(Box<eval::Eval>),
    Doctor(doctor::Doctor),
    Tune(tune::Tune),
}

/// How a command ended.
enum Outcome {
    Done,
    /// By ^C; what was made until then was shown.
    Interrupted,
    /// What was asked for does not hold, which was shown.
    Failed,
}

pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(u8::from(e.use_stderr()));
        }
    };
    let outcome = match cli.command {
        None => demo::run(),
        Some(Command::Generate(command)) => command.run(),
        Some(Command::Chat(command)) => command.run(),
        Some(Command::Score(command)) => command.run(),
        Some(Command::Explain(command)) => command.run(),
        Some(Command::Inspect(command)) => command.run(),
        Some(Command::Bench(command)) => command.run(),
        Some(Command::Eval(command)) => command.run(),
        Some(Command::Doctor(command)) => command.run(),
        Some(Command::Tune(command)) => command.run(),
    };
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(130),
        Ok(Outcome::Failed) => ExitCode::FAILURE,
        // Whoever reads the output has seen enough: `mindskip … | head`.
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(Failure::Output(e)) => fail(&format!("the output cannot be written: {e}; check where it goes")),
        Err(Failure::Error(e)) if e.kind() == Kind::Interrupted => {
            let _ = writeln!(io::stderr(), "mindskip: {e}");
            ExitCode::from(130)
        }
        Err(Failure::Error(e)) => fail(&e.to_string()),
    }
}

fn fail(message: &str) -> ExitCode {
    // It may quote what stands in a stranger's file.
    let _ = writeln!(io::stderr(), "mindskip: error: {}", show::visible(message));
    ExitCode::FAILURE
}

/// Why a command failed: an error of the library, or results that could not be written.
enum Failure {
    Error(Error),
    Output(io::Error),
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Error(e)
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Self {
        Failure::Output(e)
    }
}

type Ran = std::result::Result<Outcome, Failure>;

/// Prints a JSON value as one line.
fn print_json(value: &serde_json::Value) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    writeln!(out)
}

/// Errors: Argument, naming what to give instead.
fn bad<T>(cause: impl Into<String>, action: &str) -> Result<T> {
    Err(Error::new(Kind::Argument, cause).action(action))
}
