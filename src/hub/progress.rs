//! What a download says while it runs, on standard error: a bar on a terminal, now and then a line elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{DecimalBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where progress is reported.
pub enum Report {
    /// To standard error: a bar when it is a terminal, lines otherwise.
    Stderr,
    /// Lines, to a function.
    Lines(Box<dyn Fn(&str) + Send + Sync>),
    /// Not at all.
    Quiet,
}

impl Report {
    pub(super) fn line(&self, text: &str) {
        match self {
            Report::Stderr => eprintln!("{text}"),
            Report::Lines(print) => print(text),
            Report::Quiet => {}
        }
    }
}

/// Counts the bytes of a download, over all its files.
pub(super) struct Meter<'a> {
    report: &'a Report,
    what: String,
    bar: Option<ProgressBar>,
    start: Instant,
    total: u64,
    done: Cell<u64>,
    /// The tenth of the total that is announced next; beyond 9, none is.
    tenth: Cell<u64>,
}

impl<'a> Meter<'a> {
    pub fn new(report: &'a Report, what: String, files: usize, total: u64) -> Meter<'a> {
        let plural = if files == 1 { "" } else { "s" };
        report.line(&format!("{what}: downloading {files} file{plural}, {}", DecimalBytes(total)));
        let on_terminal = matches!(report, Report::Stderr) && std::io::stderr().is_terminal();
        let bar = on_terminal.then(|| {
            let template =
                "{bar:32} {percent:>3}%  {decimal_bytes} of {decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
            let style = ProgressStyle::with_template(template).expect("the template is well-formed");
            ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr()).with_style(style)
        });
        Meter { report, what, bar, start: Instant::now(), total, done: Cell::new(0), tenth: Cell::new(1) }
    }

    /// Bytes that came over the network.
    pub fn add(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
        self.announce();
    }

    /// Bytes that were here already: they count, but not as speed.
    pub fn found(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
            bar.reset_eta();
        }
        if bytes > 0 {
            self.report_above(&format!("{}: {} are here already, going on", self.what, DecimalBytes(bytes)));
        }
    }

    /// Bytes that have to be downloaded again.
    pub fn lost(&self, bytes: u64) {
        self.done.set(self.done.get() - bytes);
        if let Some(bar) = &self.bar {
            bar.set_position(self.done.get());
        }
    }

    /// A line that does not disturb the bar.
    pub fn report_above(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.report.line(text)),
            None => self.report.line(text),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.report.line(&format!("{}: downloaded in {}", self.what, HumanDuration(self.start.elapsed())));
    }

    fn announce(&self) {
        let tenth = self.done.get() * 10 / self.total.max(1);
        if self.bar.is_some() || tenth < self.tenth.get() || tenth > 9 {
            return;
        }
        self.tenth.set(tenth + 1);
        let (done, total) = (DecimalBytes(self.done.get()), DecimalBytes(self.total));
        self.report.line(&format!("{}: {}% ({done} of {total})", self.what, tenth * 10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn a_line_for_every_tenth_that_is_reached() {
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let sink = lines.clone();
        let report = Report::Lines(Box::new(move |line| sink.lock().unwrap().push(line.into())));
        let meter = Meter::new(&report, "a/b".into(), 1, 1_000_000);
        meter.found(50_000);
        for bytes in [49_999, 1, 99_999, 250_000, 50_001, 450_000] {
            meter.add(bytes);
        }
        meter.lost(950_000);
        for bytes in [500_000, 450_000] {
            meter.add(bytes);
        }
        meter.finish();
        let lines = lines.lock().unwrap();
        assert_eq!(
            lines[..lines.len() - 1],
            [
                "a/b: downloading 1 file, 1.00 MB",
                "a/b: 50.00 kB are here already, going on",
                "a/b: 10% (100.00 kB of 1.00 MB)",
                "a/b: 40% (450.00 kB of 1.00 MB)",
                "a/b: 50% (500.00 kB of 1.00 MB)",
                "a/b: 90% (950.00 kB of 1.00 MB)",
            ]
        );
        assert!(lines.last().unwrap().starts_with("a/b: downloaded in "));
        let none = Report::Lines(Box::new(|_| {}));
        Meter::new(&none, "empty".into(), 1, 0).add(0);
    }
}
