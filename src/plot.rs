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
const LEGEND: u32 = 170;
/// Lines of no more points show each.
const FEW: usize = 12;

/// Lines over common axes.
#[derive(Debug, Clone, PartialEq)]
pub struct Chart {
    pub title: String,
    /// What the axes are.
    pub x: String,
    pub y: String,
    pub lines: Vec<Line>,
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
        }
    }
}

/// Draws charts, one below the other.
pub fn lines(charts: &[Chart]) -> Result<String> {
    draw(charts.len(), |n, area| {
        let chart = &charts[n];
        let all = || chart.lines.iter().flat_map(Line::finite);
        let (x, y) = (range(all().map(|p| p.0), 0.0), range(all().map(|p| p.1), 0.05));
        let legend: Vec<_> = chart.lines.iter().map(|line| (line.name.as_str(), line.pen.style())).collect();
        let mut axes = axes(area, [&chart.title, &chart.x, &chart.y], [x, y], &legend)?;
        for line in &chart.lines {
            axes.draw_series(LineSeries::new(line.finite(), line.pen.style())).map_err(failed)?;
            if line.points.len() <= FEW {
                let style = line.pen.style().filled();
                axes.draw_series(line.finite().map(|at| Circle::new(at, 4, style))).map_err(failed)?;
            }
        }
        Ok(())
    })
}

/// Draws bars.
pub fn bars(chart: &Bars) -> Result<String> {
    draw(1, |_, area| {
        let styles = [RGBColor(20, 90, 190), RGBColor(190, 190, 190)].map(|colour| colour.filled());
        let names = chart.names.iter().map(String::as_str);
        let legend: Vec<_> = names.zip(styles.map(|style| style.stroke_width(8))).collect();
        let heights = chart.bars.iter().map(|&(value, _)| value.min(chart.top));
        let y = range(heights.chain([0.0]), 0.08);
        let x = (-0.6, chart.bars.len() as f64 - 0.4);
        let mut axes = axes(area, [&chart.title, &chart.x, &chart.y], [x, y], &legend)?;
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
pub fn save(svg: &str, path: &Path) -> Result<()> {
    files::write_atomically(path, |file| file.write_all(svg.as_bytes()))
}

impl Line {
    fn finite(&self) -> impl Iterator<Item = (f64, f64)> {
        self.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite())
    }
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

/// Axes with their texts: title, x, y; and the legend beside them.
fn axes<'a, 'b>(
    area: &'a Area<'b>,
    [title, x, y]: [&str; 3],
    [xs, ys]: [(f64, f64); 2],
    legend: &[(&str, ShapeStyle)],
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
        .x_label_formatter(&|&value| short(value))
        .y_label_formatter(&|&value| short(value))
        .draw()
        .map_err(failed)?;
    let left = (SIZE.0 - LEGEND + 14) as i32;
    let pitch = (330 / legend.len().max(1) as i32).min(18);
    for (at, (name, style)) in (40..).step_by(pitch as usize).zip(legend) {
        let sample = PathElement::new([(left, at), (left + 22, at)], *style);
        area.draw(&sample).map_err(failed)?;
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
        let lines = vec![line("a < b & \"c\"", Pen::Main), line("base", Pen::Base), line("many", Pen::Of(0.5))];
        Chart { title: "<script>".into(), x: "x".into(), y: "y".into(), lines }
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
        for points in cases {
            let svg = lines(&[chart(points.clone())]).unwrap();
            assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"), "{points:?}: {svg}");
        }
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
