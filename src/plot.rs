//! Charts as SVG. The same numbers give the same bytes.

use std::fmt::Display;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::error::{Error, Kind, Result};
use crate::files;

/// Pixels of a chart, and those of them on the right that its legend takes.
const SIZE: (u32, u32) = (900, 380);
const LEGEND: u32 = 190;
/// Pixels of a dash and of the gap behind it.
const DASH: (u32, u32) = (7, 5);
/// Lines of no more points show each.
const FEW: usize = 12;

/// Lines over common axes. Those of the same name have one place in the legend.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chart {
    pub title: String,
    /// What the axes are.
    pub x: String,
    pub y: String,
    pub lines: Vec<Line>,
    /// Every doubling of x takes the same width.
    pub doublings: bool,
    /// y begins at 0.
    pub from_zero: bool,
}

/// A named course of points; those that are not finite are left out.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    pub pen: Pen,
}

/// What a line looks like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pen {
    /// What it is about: black and thick.
    Main,
    /// What it is compared with: grey.
    Base,
    /// One of many, from 0 to 1: from blue to orange.
    Of(f64),
    /// The same, thicker: one of a few.
    Few(f64),
    /// What one of these would be at best: in its colour, dashed.
    Ideal(f64),
}

/// Values by number, from 0.
#[derive(Debug, Clone, PartialEq)]
pub struct Bars {
    pub title: String,
    pub x: String,
    pub y: String,
    /// Values, and whether they are marked.
    pub bars: Vec<(f64, bool)>,
    /// What the marked ones are, and what the others are.
    pub names: [String; 2],
    /// What is higher is cut there, with its value written on it.
    pub top: f64,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Axes<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

impl Pen {
    fn style(self) -> ShapeStyle {
        match self {
            Pen::Main => BLACK.stroke_width(3),
            Pen::Base => RGBColor(130, 130, 130).stroke_width(2),
            Pen::Of(t) => HSLColor(0.62 - 0.55 * t, 0.8, 0.42).stroke_width(1),
            Pen::Few(t) => Pen::Of(t).style().stroke_width(2),
            Pen::Ideal(t) => Pen::Of(t).style(),
        }
    }

    fn dashed(self) -> bool {
        matches!(self, Pen::Ideal(_))
    }
}

/// Draws charts, one below the other: the text of an SVG. Errors: Argument when one cannot be drawn.
///
/// ```
/// use mindskip::plot::{Chart, Line, Pen, lines};
///
/// let line = |name: &str, pen, end| Line { name: name.into(), points: vec![(0.0, 1.0), (1.0, end)], pen };
/// let drawn = vec![line("dense", Pen::Base, 1.0), line("attn_token", Pen::Main, 1.3)];
/// let chart = Chart { title: "speedup".into(), lines: drawn, from_zero: true, ..Chart::default() };
/// let svg = lines(&[chart.clone(), chart])?;
/// assert_eq!(svg.matches("attn_token").count(), 2, "in both legends");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn lines(charts: &[Chart]) -> Result<String> {
    draw(charts.len(), |n, area| {
        let chart = &charts[n];
        let points = |line: &Line| {
            let placed = line.points.iter().map(|&(x, y)| (if chart.doublings { x.log2() } else { x }, y));
            placed.filter(|(x, y)| x.is_finite() && y.is_finite()).collect::<Vec<_>>()
        };
        let all: Vec<(f64, f64)> = chart.lines.iter().flat_map(points).collect();
        let x = range(all.iter().map(|p| p.0), 0.0);
        let (least, most) = range(all.iter().map(|p| p.1), 0.05);
        let y = (if chart.from_zero { 0.0 } else { least }, most);
        let mut legend: Vec<(&str, Sample)> = Vec::new();
        for Line { name, pen, .. } in &chart.lines {
            if legend.iter().all(|(known, _)| known != name) {
                legend.push((name, Sample { style: pen.style(), dashed: pen.dashed() }));
            }
        }
        let mut axes = axes(area, [&chart.title, &chart.x, &chart.y], [x, y], chart.doublings, &legend)?;
        for line in &chart.lines {
            let (points, style) = (points(line), line.pen.style());
            if line.pen.dashed() {
                let series = DashedLineSeries::new(points, DASH.0, DASH.1, style);
                axes.draw_series(series).map_err(failed)?;
                continue;
            }
            if points.len() <= FEW {
                let dots = points.iter().map(|&at| Circle::new(at, 4, style.filled()));
                axes.draw_series(dots).map_err(failed)?;
            }
            axes.draw_series(LineSeries::new(points, style)).map_err(failed)?;
        }
        Ok(())
    })
}

/// Draws bars: the text of an SVG. Errors: Argument when they cannot be drawn.
///
/// ```
/// use mindskip::plot::{Bars, bars};
///
/// let chart = Bars {
///     title: "what a layer adds to the loss".into(),
///     x: "layer".into(),
///     y: "loss".into(),
///     bars: vec![(7.25, false), (0.1, true)],
///     names: ["routed".into(), "not routed".into()],
///     top: 1.0,
/// };
/// assert!(bars(&chart)?.contains("7.25"), "the first bar is higher than the chart");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn bars(chart: &Bars) -> Result<String> {
    draw(1, |_, area| {
        let styles = [RGBColor(20, 90, 190), RGBColor(190, 190, 190)].map(|colour| colour.filled());
        let names = chart.names.iter().map(String::as_str);
        let legend: Vec<_> =
            names.zip(styles.map(|style| Sample { style: style.stroke_width(8), dashed: false })).collect();
        let heights = chart.bars.iter().map(|&(value, _)| value.min(chart.top));
        let y = range(heights.chain([0.0]), 0.08);
        let x = (-0.6, chart.bars.len() as f64 - 0.4);
        let mut axes = axes(area, [&chart.title, &chart.x, &chart.y], [x, y], false, &legend)?;
        for (n, &(value, marked)) in chart.bars.iter().enumerate() {
            let (at, height) = (n as f64, value.min(chart.top));
            let corners = [(at - 0.4, height.min(0.0)), (at + 0.4, height.max(0.0))];
            axes.draw_series([Rectangle::new(corners, styles[usize::from(!marked)])]).map_err(failed)?;
            if value > chart.top {
                let text = Text::new(short(value), (0, -13), ("sans-serif", 11).into_font());
                let above = EmptyElement::at((at - 0.4, height)) + text;
                axes.draw_series([above]).map_err(failed)?;
            }
        }
        Ok(())
    })
}

/// Writes a drawing, all or nothing. Errors: Io.
///
/// ```
/// use mindskip::plot::{Chart, lines, save};
///
/// let folder = tempfile::tempdir().unwrap();
/// let (svg, path) = (lines(&[Chart::default()])?, folder.path().join("chart.svg"));
/// save(&svg, &path)?;
/// assert_eq!(std::fs::read_to_string(&path).unwrap(), svg);
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn save(svg: &str, path: &Path) -> Result<()> {
    files::write_atomically(path, |file| file.write_all(svg.as_bytes()))
}

fn draw(charts: usize, each: impl Fn(usize, &Area) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (SIZE.0, SIZE.1 * charts as u32)).into_drawing_area();
        // Not transparent: black text on a dark page.
        root.fill(&WHITE).map_err(failed)?;
        for (n, area) in root.split_evenly((charts, 1)).iter().enumerate() {
            each(n, area)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(svg)
}

/// What stands for a line in a legend.
#[derive(Clone, Copy)]
struct Sample {
    style: ShapeStyle,
    dashed: bool,
}

/// Axes with their texts: title, x, y; and the legend beside them. With `doublings` x is a logarithm of base 2.
fn axes<'a, 'b>(
    area: &'a Area<'b>,
    [title, x, y]: [&str; 3],
    [xs, ys]: [(f64, f64); 2],
    doublings: bool,
    legend: &[(&str, Sample)],
) -> Result<Axes<'a, 'b>> {
    let mut axes = ChartBuilder::on(area)
        .margin(12)
        .margin_right(LEGEND)
        .caption(title, ("sans-serif", 17))
        .x_label_area_size(42)
        .y_label_area_size(64)
        .build_cartesian_2d(xs.0..xs.1, ys.0..ys.1)
        .map_err(failed)?;
    axes.configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 14))
        .bold_line_style(RGBColor(225, 225, 225))
        .light_line_style(WHITE)
        .x_label_formatter(&|&value| match doublings {
            true if value.fract() == 0.0 => short(value.exp2()),
            true => String::new(),
            false => short(value),
        })
        .y_label_formatter(&|&value| short(value))
        .draw()
        .map_err(failed)?;
    let left = (SIZE.0 - LEGEND + 14) as i32;
    let pitch = (330 / legend.len().max(1) as i32).min(18);
    for (at, (name, sample)) in (40..).step_by(pitch as usize).zip(legend) {
        let dash = |from: i32, to: i32| PathElement::new([(left + from, at), (left + to, at)], sample.style);
        let dashes = if sample.dashed { vec![dash(0, 8), dash(14, 22)] } else { vec![dash(0, 22)] };
        dashes.iter().try_for_each(|dash| area.draw(dash)).map_err(failed)?;
        let font = ("sans-serif", (pitch - 2).min(13)).into_font();
        area.draw(&Text::new(*name, (left + 28, at - pitch / 3), font)).map_err(failed)?;
    }
    Ok(axes)
}

/// The least and the greatest, and a share more on both sides; never empty.
fn range(values: impl Iterator<Item = f64>, more: f64) -> (f64, f64) {
    let (least, most) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    match most - least {
        width if width > 0.0 => (least - more * width, most + more * width),
        0.0 => (least - 0.5, least + 0.5),
        _ => (0.0, 1.0),
    }
}

/// A number with at most four decimals.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Nothing can fail while text is made, as far as is known.
fn failed(error: impl Display) -> Error {
    Error::new(Kind::Argument, format!("the chart cannot be drawn: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>) -> Chart {
        let line = |name: &str, pen| Line { name: name.into(), points: points.clone(), pen };
        let pens =
            [("a < b & \"c\"", Pen::Main), ("base", Pen::Base), ("many", Pen::Of(0.5)), ("best", Pen::Ideal(0.5))];
        let lines = pens.map(|(name, pen)| line(name, pen)).into();
        Chart { title: "<script>".into(), x: "x".into(), y: "y".into(), lines, ..Chart::default() }
    }

    #[test]
    fn text_is_escaped_and_bytes_are_the_same() {
        let chart = chart(vec![(1.0, 2.0), (2.0, 1.5), (3.0, 1.75)]);
        let svg = lines(&[chart.clone(), chart.clone()]).unwrap();
        assert!(svg.contains("&lt;script&gt;") && svg.contains("a &lt; b &amp; &quot;c&quot;"), "{svg}");
        assert!(!svg.contains("<script>"));
        assert_eq!(svg, lines(&[chart.clone(), chart]).unwrap());
    }

    /// No point, one point, all the same, some that are none.
    #[test]
    fn any_numbers_make_a_chart() {
        let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        let cases = [
            vec![],
            vec![(1.0, 1.0)],
            vec![(1.0, 1.0), (2.0, 1.0)],
            odd.map(|y| (1.0, y)).to_vec(),
            vec![(0.0, -1e30), (1e-30, 1e30)],
        ];
        let axes = [(false, false), (true, true)];
        for (points, (doublings, from_zero)) in cases.iter().flat_map(|points| axes.map(|axes| (points, axes))) {
            let svg = lines(&[Chart { doublings, from_zero, ..chart(points.clone()) }]).unwrap();
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{points:?}: {svg}");
        }
    }

    /// Each doubling is written, and nothing in between; lines of one name stand once in the legend, dashed where they are.
    #[test]
    fn doublings_and_legends() {
        let chart = Chart { doublings: true, ..chart([512, 1024, 2048, 4096].map(|x| (f64::from(x), 1.0)).to_vec()) };
        let svg = lines(&[chart]).unwrap();
        let texts: Vec<&str> = svg.lines().map(str::trim).filter(|line| !line.starts_with('<')).collect();
        for x in ["512", "1024", "2048", "4096", "best"] {
            assert_eq!(texts.iter().filter(|text| **text == x).count(), 1, "{x} in {texts:?}");
        }
        assert!(!texts.contains(&"724.0773"), "{texts:?}");
        let twice = lines(&[Chart {
            lines: [("a", 0.0), ("b", 1.0)]
                .map(|(_, t)| Line { name: "ideal".into(), points: vec![(0.0, t), (1.0, t)], pen: Pen::Ideal(t) })
                .into(),
            ..Chart::default()
        }])
        .unwrap();
        assert_eq!(twice.matches("ideal").count(), 1, "{twice}");
        assert!(twice.matches("<polyline").count() > 60, "dashes: {twice}");
    }

    #[test]
    fn bars_that_are_too_high_say_so() {
        let (title, x, y, names) = ("t".into(), "x".into(), "y".into(), ["marked".into(), "others".into()]);
        let svg = bars(&Bars { title, x, y, bars: vec![(0.5, true), (7.25, false), (-0.1, true)], names, top: 1.0 });
        let svg = svg.unwrap();
        assert_eq!(svg.matches("7.25").count(), 1, "{svg}");
        // Three bars and the background.
        assert_eq!(svg.matches("<rect").count(), 4, "{svg}");
    }
}
