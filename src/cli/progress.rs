//! How far a long prefill is, and ^C.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Whether ^C is to be noted, and whether it was pressed.
static NOTED: AtomicBool = AtomicBool::new(false);
static PRESSED: AtomicBool = AtomicBool::new(false);

/// As long as it lives ^C is noted; the second one ends the program. Otherwise the first one does.
pub struct Interrupts;

/// From now on ^C is noted, see [`interrupted`].
#[must_use]
pub fn catch_interrupts() -> Interrupts {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Without a handler ^C ends the program as it always does.
        let _ = ctrlc::set_handler(|| {
            if PRESSED.swap(true, Ordering::Relaxed) || !NOTED.load(Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
    });
    PRESSED.store(false, Ordering::Relaxed);
    NOTED.store(true, Ordering::Relaxed);
    Interrupts
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        NOTED.store(false, Ordering::Relaxed);
    }
}

/// Whether ^C was pressed.
pub fn interrupted() -> bool {
    PRESSED.load(Ordering::Relaxed)
}

/// Nothing is shown of what takes less.
const PATIENCE: Duration = Duration::from_millis(700);
/// Between two lines where there is no terminal.
const LINES: Duration = Duration::from_secs(5);

/// A bar on a terminal, now and then a line elsewhere.
pub struct Bar {
    bar: Option<ProgressBar>,
    said: Option<Instant>,
}

impl Bar {
    /// The template is indicatif's.
    pub fn new(template: &str, done: usize, all: usize) -> Bar {
        let target = ProgressDrawTarget::stderr();
        let style = || ProgressStyle::with_template(template).expect("a fixed template");
        let bar = || ProgressBar::with_draw_target(Some(all as u64), ProgressDrawTarget::stderr()).with_style(style());
        let bar = (!target.is_hidden()).then(|| bar().with_position(done as u64));
        Bar { bar, said: None }
    }

    /// `line` is what is said where there is no terminal: the first time, when it is due, and when it `must` be.
    pub fn show(&mut self, done: usize, message: &str, must: bool, line: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            bar.set_message(message.to_string());
        } else if must || self.said.is_none_or(|said| said.elapsed() > LINES) {
            eprintln!("{}", line());
            self.said = Some(Instant::now());
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.take().inspect(ProgressBar::finish_and_clear);
    }
}

/// Watches prefills: a bar on a terminal, now and then a line elsewhere, and the end on ^C.
pub fn reading() -> impl Fn(f64) -> ControlFlow<()> + Send + Sync {
    struct Seen {
        start: Instant,
        last: f64,
        said: Instant,
        bar: Option<ProgressBar>,
    }
    let seen: Mutex<Option<Seen>> = Mutex::new(None);
    move |done| {
        let mut seen = seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if seen.as_ref().is_none_or(|s| done < s.last) {
            let now = Instant::now();
            *seen = Some(Seen { start: now, last: done, said: now, bar: None });
        }
        let s = seen.as_mut().expect("just made");
        s.last = done;
        let target = ProgressDrawTarget::stderr();
        if done >= 1.0 {
            s.bar.take().inspect(ProgressBar::finish_and_clear);
            *seen = None;
        } else if s.start.elapsed() > PATIENCE {
            if target.is_hidden() {
                if s.said.elapsed() > LINES {
                    eprintln!("reading the prompt: {:.0}%", done * 100.0);
                    s.said = Instant::now();
                }
            } else {
                let bar = s.bar.get_or_insert_with(|| {
                    let style = ProgressStyle::with_template("reading the prompt {wide_bar} {percent}% {eta}");
                    ProgressBar::with_draw_target(Some(1000), target).with_style(style.expect("a fixed template"))
                });
                bar.set_position((done * 1000.0) as u64);
            }
        }
        if interrupted() {
            seen.take().and_then(|s| s.bar).inspect(ProgressBar::finish_and_clear);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}
