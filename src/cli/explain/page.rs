//! The page of `mindskip explain --html`: one file that asks for nothing else and runs no script.

use std::fmt::Write;

use super::{Report, at, label, visible};

const STYLE: &str = "
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1f; --dim: #66666e; --line: #d8d8de; --on: #1f6feb; --off: #c2701a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16171b; --ink: #e6e6ea; --dim: #9a9aa4; --line: #3a3b42; --on: #5b9dff; --off: #e0903c; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem 4rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
p { color: var(--dim); margin: .3rem 0 1rem; }
.text { font-size: 1.1rem; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere; }
.text a { color: inherit; text-decoration: none; padding: .15em 0; background: color-mix(in srgb, var(--on) calc(var(--s) * .6%), transparent); }
.text a:hover, td:hover { outline: 2px solid var(--ink); outline-offset: -1px; }
.key span { display: inline-block; min-width: 2em; text-align: center; color: var(--ink); background: color-mix(in srgb, var(--on) calc(var(--s) * .6%), transparent); }
table { border-collapse: collapse; font-size: .8rem; line-height: 1.2; }
th { font-weight: normal; color: var(--dim); padding: .1rem .3rem; }
thead th { position: sticky; top: 0; background: var(--paper); }
thead th b { display: block; color: var(--ink); }
tbody th { color: var(--ink); text-align: left; font-family: ui-monospace, monospace; white-space: pre; max-width: 16rem; overflow: hidden; text-overflow: ellipsis; }
td { min-width: 1.7rem; height: 1.1rem; border: 1px solid var(--paper); }
.on { background: color-mix(in srgb, var(--on) calc(25% + var(--s) * .75%), var(--paper)); }
.off { background: color-mix(in srgb, var(--off) calc(32% - var(--s) * .25%), var(--paper)); }
tr { scroll-margin-top: 3rem; }
tr:target th { outline: 2px solid var(--on); outline-offset: -2px; }
[data-t]:hover::after { content: attr(data-t); position: fixed; right: 1rem; bottom: 1rem; max-width: calc(100vw - 2rem); box-sizing: border-box; padding: .4rem .8rem; border: 1px solid var(--line); border-radius: .4rem; background: var(--paper); color: var(--ink); font: 14px/1.4 system-ui, sans-serif; white-space: normal; }
";

/// Within an element or a quoted attribute.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

/// A share in percent, for the style sheet.
fn percent(share: f64) -> u32 {
    (share * 100.0).round() as u32
}

pub fn of(report: &Report) -> String {
    let all = report.traces.len();
    let (model, routing) = (escaped(&visible(&report.model)), escaped(&report.routing));
    let mut page = String::new();
    let mut put = |text: std::fmt::Arguments| page.write_fmt(text).expect("text takes text");
    put(format_args!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{model}: what each token passed</title>\n<style>{STYLE}</style>\n</head>\n<body>\n\
         <h1>{model}</h1>\n<p>{routing}; capacity {:.1}% of the routed layers</p>\n<div class=\"text\">",
        report.usage.capacity() * 100.0
    ));
    for (i, token) in report.tokens.iter().enumerate().filter(|(_, token)| !token.text.is_empty()) {
        let share = percent(token.passed as f64 / all as f64);
        let (name, text) = (escaped(&label(&token.text)), escaped(&visible(&token.text)));
        let tip = format!("{name} · {} of {all} routed layers", token.passed);
        put(format_args!("<a href=\"#t{i}\" style=\"--s:{share}\" data-t=\"{tip}\"><bdi>{text}</bdi></a>"));
    }
    put(format_args!("</div>\n<p class=\"key\">layers passed:"));
    for passed in 0..=all {
        put(format_args!(" <span style=\"--s:{}\">{passed}</span>", percent(passed as f64 / all as f64)));
    }
    put(format_args!(
        "</p>\n<p>Each token in each routed layer: blue where it was active, orange where it skipped; the stronger the surer. \
         Below a layer its capacity.</p>\n<table>\n<thead><tr><th></th>"
    ));
    for trace in &report.traces {
        put(format_args!("<th><b>{}</b>{}%</th>", trace.layer, percent(report.capacity(trace))));
    }
    put(format_args!("</tr></thead>\n<tbody>\n"));
    for (i, token) in report.tokens.iter().enumerate() {
        let name = escaped(&label(&token.text));
        put(format_args!("<tr id=\"t{i}\"><th><bdi>{name}</bdi></th>"));
        for trace in &report.traces {
            let (active, score) = at(trace, i);
            let (class, what) = if active { ("on", "active") } else { ("off", "skipped") };
            let tip = format!("{name} · layer {} · score {score:.4} · {what}", trace.layer);
            put(format_args!(
                "<td class=\"{class}\" style=\"--s:{}\" data-t=\"{tip}\"></td>",
                percent(f64::from(score))
            ));
        }
        put(format_args!("</tr>\n"));
    }
    put(format_args!("</tbody>\n</table>\n</body>\n</html>\n"));
    page
}
