//! The bench measures what it says it does.

mod common;

use std::ops::ControlFlow;

use common::*;
use mindskip::Kind;
use mindskip::backend::AnyKind;
use mindskip::bench::{
    Format, OpRow, OpsPlan, PaperPlan, Phase, Plan, Row, Saved, Setting, Subject, Verdict, Way, charts, compare,
    measure, measure_ops, measure_paper, write,
};
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Kernels, Precision};
use mindskip::model::Routing;
use mindskip::plot::{self, Pen};
use mindskip::router::{Granularity, Keys, RouterSettings};
use mindskip::tensor::DType;

fn setting(device: Device, dtype: Option<DType>) -> Setting {
    Setting {
        device,
        dtype,
        kv_dtype: None,
        threads: Some(2),
        precision: Precision::F32,
        kernels: Kernels::Auto,
        memory: None,
    }
}

fn stories() -> Subject {
    Subject::model(Bundle::embedded().unwrap())
}

fn random(name: &str, keys: Keys, capacity: f32) -> Way {
    let settings = RouterSettings { granularity: name.parse().unwrap(), keys, ..RouterSettings::default() };
    Way { routing: Some(random_gates(settings, &[3, 4, 5, 6], capacity)) }
}

fn plan(subject: Subject, setting: Setting, ways: Vec<Way>) -> Plan {
    Plan {
        subject,
        settings: vec![setting],
        batches: vec![2],
        depths: vec![0],
        prompts: vec![64],
        generated: vec![8],
        ways,
        warmup: 0,
        reps: 2,
        seed: 1,
    }
}

fn rows(plan: &Plan) -> Vec<Row> {
    let mut rows = Vec::new();
    measure(plan, &mut |_| ControlFlow::Continue(()), &mut |more| rows.extend(more)).unwrap();
    rows
}

/// All numbers are finite, and those that measure something are above 0.
fn check(row: &Row) {
    let what = format!("{row:?}");
    for Phase {
        tokens_per_s, spread, ms_per_token, speedup, ideal_speedup, skip_efficiency, of_ideal, samples, ..
    } in row.prefill.iter().chain(&row.decode)
    {
        for x in
            [tokens_per_s, ms_per_token, speedup, ideal_speedup, skip_efficiency, of_ideal].into_iter().chain(samples)
        {
            assert!(x.is_finite() && *x > 0.0, "{what}");
        }
        assert!(spread.is_finite() && *spread >= 0.0, "{what}");
        assert_eq!(samples.len(), row.reps, "{what}");
    }
    assert!(row.head.copy_rate.is_finite() && row.head.copy_rate > 0.0, "{what}");
    assert!(row.head.product_rate.is_finite() && row.head.product_rate > 0.0, "{what}");
    assert!(row.memory > row.kv && row.kv > 0, "{what}");
}

#[test]
fn every_way_gives_figures() {
    let mut ways = vec![Way::DENSE, Way { routing: Bundle::embedded().unwrap().routers.map(Routing::routers) }];
    ways.extend(Granularity::NAMES.iter().map(|name| random(name, Keys::All, 0.5)));
    ways.push(random("attn_token", Keys::Active, 0.5));
    let rows = rows(&plan(stories(), setting(Device::Cpu, None), ways));
    rows.iter().for_each(check);
    let names: Vec<&str> = rows.iter().map(|row| row.routing.as_str()).collect();
    assert_eq!(names[..2], ["dense", "attn_token"]);
    assert_eq!(names[2..8], Granularity::NAMES);

    let dense = &rows[0];
    assert_eq!((dense.active, dense.kv_saved), (1.0, 0));
    for phase in dense.prefill.iter().chain(&dense.decode) {
        assert_eq!((phase.speedup, phase.ideal_speedup, phase.skip_efficiency), (1.0, 1.0, 1.0));
    }
    for row in rows[1..].iter().filter(|row| row.routing.ends_with("token")) {
        // 4 layers of 2 x 72 tokens that are drawn: four standard errors.
        if row.capacity.is_some() {
            assert!((row.active - 0.5).abs() < 4.0 * 0.5 / (576f64).sqrt(), "{}: {}", row.routing, row.active);
        }
        let phases = [(&row.prefill, &dense.prefill), (&row.decode, &dense.decode)];
        for (own, dense) in phases.map(|(own, dense)| (own.as_ref().unwrap(), dense.as_ref().unwrap())) {
            assert!(own.flops < dense.flops && own.ideal_speedup > 1.0, "{}", row.routing);
        }
    }
    assert!(rows[8].kv_saved > 0 && rows[8].memory < dense.memory, "keys active");
}

/// With all rows active the work is that of the dense model, whatever is counted; without any it is less.
#[test]
fn full_capacity_is_dense_work() {
    let ways = vec![Way::DENSE, random("block_token", Keys::All, 1.0), random("block_token", Keys::All, 0.0)];
    let all = Plan { depths: vec![0, 40], generated: vec![0, 3], ..plan(stories(), setting(Device::Cpu, None), ways) };
    let rows = rows(&all);
    assert_eq!(rows.len(), 2 * 2 * 3);
    for of_point in rows.chunks(3) {
        let [dense, full, none] = of_point else { unreachable!() };
        assert_eq!((dense.active, full.active, none.active), (1.0, 1.0, 0.0));
        assert_eq!(dense.decode.is_some(), dense.generated > 0);
        for phase in [|row: &Row| row.prefill.clone(), |row: &Row| row.decode.clone()] {
            let (Some(dense), Some(full), Some(none)) = (phase(dense), phase(full), phase(none)) else { continue };
            assert_eq!(full.flops, dense.flops);
            assert!(none.flops < dense.flops && none.bytes < dense.bytes);
        }
    }
    // What a deeper cache costs is attention.
    let flops = |depth: usize| {
        let row = rows.iter().find(|row| row.depth == depth && row.generated == 3).unwrap();
        row.decode.as_ref().unwrap().flops
    };
    assert!(flops(40) > flops(0));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let good = plan(stories(), setting(Device::Cpu, None), vec![Way::DENSE]);
    let wrong = [
        (Plan { reps: 0, ..good.clone() }, "--reps is 0"),
        (Plan { batches: vec![1, 0], ..good.clone() }, "--batch names nothing"),
        (Plan { prompts: vec![0], generated: vec![0], ..good.clone() }, "measures nothing"),
        (Plan { depths: vec![450], ..good.clone() }, "come to 524 tokens, and stories takes 512"),
        (Plan { settings: vec![setting(Device::Cpu, Some(DType::F16))], ..good.clone() }, "does not convert it to f16"),
    ];
    for (plan, text) in wrong {
        let error = measure(&plan, &mut |_| ControlFlow::Continue(()), &mut |_| panic!("rows")).unwrap_err();
        assert_eq!(error.kind(), Kind::Argument);
        assert!(error.to_string().contains(text) && error.to_string().contains("; "), "{error}");
    }
    let error = measure(&good, &mut |_| ControlFlow::Break(()), &mut |_| panic!("rows")).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted);
}

fn ops(subject: Subject, setting: Setting, rows: Vec<usize>, context: usize) -> Vec<OpRow> {
    let plan = OpsPlan { subject, setting, rows, context, reps: 2 };
    let mut all = Vec::new();
    measure_ops(&plan, &mut |_| ControlFlow::Continue(()), &mut |rows| all.extend(rows)).unwrap();
    all
}

/// Every op at every size, with the cost that its rows have.
fn check_ops(all: &[OpRow], sizes: &[usize]) {
    let names: Vec<&str> = AnyKind::all().map(AnyKind::name).collect();
    for (rows, of_size) in sizes.iter().zip(all.chunks(names.len())) {
        assert_eq!(of_size.iter().map(|row| row.op.as_str()).collect::<Vec<_>>(), names);
        for row in of_size {
            assert_eq!(row.rows, *rows);
            assert!(row.bytes > 0 && row.us.is_finite() && row.us > 0.0, "{row:?}");
            assert!(row.of_ideal.is_finite() && row.of_ideal > 0.0, "{row:?}");
        }
    }
    assert_eq!(all.len(), sizes.len() * names.len());
}

#[test]
fn every_op_is_measured() {
    let all = ops(stories(), setting(Device::Cpu, None), vec![1, 48], 100);
    check_ops(&all, &[1, 48]);
    let attend = |rows| all.iter().find(|row| row.op == "attend" && row.rows == rows).unwrap();
    // Two heads of 64; the last row sees 100 rows, and each one before it one less.
    assert_eq!(attend(1).flops, 4 * 100 * 128);
    assert_eq!(attend(48).flops, 4 * (53..=100).sum::<u64>() * 128);
    // Backward there is no row but those of the step, and five products where forward has two.
    let backward = all.iter().find(|row| row.op == "attend_backward" && row.rows == 48).unwrap();
    assert_eq!((backward.context, backward.flops), (48, 10 * (1..=48).sum::<u64>() * 128));
    assert_eq!((backward.head.kv_dtype.as_str(), backward.head.dtype.as_str()), ("f32", "bf16"));
}

/// A chart of each phase for what is swept, with what the rows say: measured, and the ideal in the same colour.
#[test]
fn charts_show_what_was_swept() {
    let ways = || vec![Way::DENSE, random("attn_token", Keys::All, 0.75), random("attn_token", Keys::All, 0.25)];
    let by_capacity = rows(&plan(stories(), setting(Device::Cpu, None), ways()));
    let all = charts(&by_capacity);
    assert_eq!(all.len(), 2, "prefill and decode");
    for (chart, phase) in all.iter().zip([|row: &Row| row.prefill.clone(), |row: &Row| row.decode.clone()]) {
        assert!(chart.x.starts_with("capacity") && chart.y == "speedup over dense", "{chart:?}");
        let [base, measured, ideal] = &chart.lines[..] else { panic!("{chart:?}") };
        assert_eq!((base.name.as_str(), measured.name.as_str()), ("dense", "attn_token, all"));
        assert_eq!((measured.pen, ideal.pen), (Pen::Few(0.0), Pen::Ideal(0.0)));
        // From the least capacity to the greatest.
        for (at, row) in [&by_capacity[2], &by_capacity[1]].into_iter().enumerate() {
            let phase = phase(row).unwrap();
            assert_eq!(measured.points[at], (row.active, phase.speedup));
            assert_eq!(ideal.points[at], (row.active, phase.ideal_speedup));
        }
    }
    let svg = plot::lines(&all).unwrap();
    assert!(svg.contains("attn_token, all") && svg.contains("speedup over dense"), "{svg}");

    let scaled = Plan {
        batches: vec![1, 2, 4],
        depths: vec![16, 0],
        generated: vec![2],
        ..plan(stories(), setting(Device::Cpu, None), ways()[..2].to_vec())
    };
    let by_size = rows(&scaled);
    let all = charts(&by_size);
    let axes: Vec<&str> = all.iter().map(|chart| chart.x.split(':').next().unwrap()).collect();
    assert_eq!(axes, ["depth", "batch", "depth", "batch"], "capacity has one value");
    assert_eq!(all.iter().map(|chart| chart.doublings).collect::<Vec<_>>(), [false, true, false, true]);
    let dense = &all[3].lines[0];
    let expected = |batch: usize| {
        let row = by_size.iter().find(|row| (row.batch, row.depth, row.routing.as_str()) == (batch, 16, "dense"));
        (batch as f64, 1e3 / row.unwrap().decode.as_ref().unwrap().tokens_per_s)
    };
    assert_eq!(dense.points, [1, 2, 4].map(expected), "depth stays at the first one listed");
}

/// The six granularities and what the paper says of their targets, on a shape of the same proportions.
#[test]
fn the_papers_table_has_its_figures() {
    let plan = PaperPlan {
        settings: vec![setting(Device::Cpu, None)],
        scale: Some(8),
        batch: 1,
        depth: 0,
        prompt: 4,
        generated: 0,
        warmup: 0,
        reps: 1,
        seed: 0,
    };
    let mut all = Vec::new();
    measure_paper(&plan, &mut |_| ControlFlow::Continue(()), &mut |rows| all.extend(rows)).unwrap();
    all.iter().for_each(|row| check(&row.row));
    assert_eq!(all[1..].iter().map(|row| row.row.routing.as_str()).collect::<Vec<_>>(), Granularity::NAMES);
    let published: Vec<_> = all.iter().map(|row| row.published).collect();
    let [attn, mlp, block] = [Some(1.21), Some(1.06), Some(1.27)];
    assert_eq!(published, [None, attn, attn, mlp, mlp, block, block]);
    assert!(all.iter().all(|row| row.scale == 8 && row.row.head.model.contains("all widths by 8")));
    let mut table = Vec::new();
    write(Format::Md, &all, &mut table).unwrap();
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("arXiv 2410.13184v1") && table.contains("all widths by 8"), "{table}");
    let error = measure_paper(&PaperPlan { scale: Some(3), ..plan }, &mut |_| ControlFlow::Continue(()), &mut |_| {
        panic!("rows")
    });
    assert!(error.unwrap_err().to_string().contains("--scale is 3; give 1, 2, 4 or 8"));
}

fn saved(rows: &[Row]) -> Saved {
    let mut bytes = Vec::new();
    write(Format::Jsonl, rows, &mut bytes).unwrap();
    Saved::parse(&bytes).unwrap()
}

/// Times of decode steps are changed after the fact, so what has to be found is known.
#[test]
fn comparisons_find_what_changed() {
    let ways = vec![Way::DENSE, random("attn_token", Keys::All, 0.5)];
    let all = Plan { prompts: vec![4], generated: vec![1], ..plan(stories(), setting(Device::Cpu, None), ways) };
    let mut old = rows(&all);
    let times = |row: &mut Row, median: f64| {
        let phase = row.decode.as_mut().unwrap();
        phase.samples = [0.99, 0.995, 1.0, 1.005, 1.01].map(|share| share * median).to_vec();
    };
    old.iter_mut().for_each(|row| times(row, 0.1));
    let verdict = |new: &[Row], which: usize| {
        let rows = compare(&saved(&old), &saved(new), 0.03).rows;
        let decode: Vec<_> = rows.iter().filter(|row| row.what.test.starts_with("decode")).collect();
        (decode[which].verdict, decode[which].ratio.map(|ratio| (ratio * 1e3).round() / 1e3), rows.len())
    };
    let mut new = old.clone();
    times(&mut new[0], 0.05);
    times(&mut new[1], 0.15);
    assert_eq!(verdict(&new, 0), (Verdict::Faster, Some(0.5), 4));
    assert_eq!(verdict(&new, 1), (Verdict::Slower, Some(1.5), 4));
    // Sure, but small; then two repetitions, which say nothing.
    times(&mut new[1], 0.1025);
    assert_eq!(verdict(&new, 1), (Verdict::Same, Some(1.025), 4));
    new[1].decode.as_mut().unwrap().samples = vec![0.3, 0.31];
    assert_eq!(verdict(&new, 1).0, Verdict::TooFew);
    // As much as repetitions scatter.
    new[1].decode.as_mut().unwrap().samples = vec![0.2, 0.098, 0.2, 0.1, 0.2];
    assert_eq!(verdict(&new, 1).0, Verdict::Same);

    // What is swept has to be the same; what is not may differ, and is told.
    new[1].capacity = Some(0.25);
    new.iter_mut().for_each(|row| row.head.driver = Some("580.1".into()));
    let compared = compare(&saved(&old), &saved(&new), 0.03);
    assert_eq!(compared.differences, ["driver: - and 580.1"]);
    let count = |verdict| compared.rows.iter().filter(|row| row.verdict == verdict).count();
    assert_eq!((count(Verdict::OnlyA), count(Verdict::OnlyB), compared.rows.len()), (2, 2, 6));
    let mut two = old.clone();
    two.extend(old.iter().cloned().map(|mut row| {
        row.head.dtype = "f16".into();
        row
    }));
    let compared = compare(&saved(&two), &saved(&old), 0.03);
    assert!(compared.differences.is_empty(), "{:?}", compared.differences);
    let alone: Vec<_> = compared.rows.iter().filter(|row| row.verdict == Verdict::OnlyA).collect();
    assert!(alone.len() == 4 && alone.iter().all(|row| row.setting == "dtype f16"), "{alone:?}");

    // Two runs in one file count together.
    let twice = compare(&saved(&[old.clone(), old.clone()].concat()), &saved(&old), 0.03);
    assert_eq!(twice.rows.len(), 4);
}

#[test]
fn results_that_are_none_are_refused() {
    let good = rows(&plan(stories(), setting(Device::Cpu, None), vec![Way::DENSE]));
    let text = serde_json::to_string(&good).unwrap();
    let cases = [
        (String::new(), "it holds no measurement"),
        ("[]".into(), "it holds no measurement"),
        ("{}".into(), "record 1: "),
        ("null\n".into(), "record 1: "),
        (text[..text.len() / 2].into(), "line 1 column"),
        (text.replace("\"samples\":[", "\"samples\":[-1.0,"), "or wrong ones"),
        (text.replace("\"samples\":[", "\"samples\":[1e999,"), "out of range"),
        ("[".repeat(100_000), "recursion limit"),
        ("{\"op\":\"attend\"}".into(), "missing field"),
    ];
    for (text, part) in cases {
        let error = Saved::parse(text.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Format);
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert!(Saved::parse(&[0xff, 0xfe]).unwrap_err().to_string().contains("not text"));
    assert!(Saved::parse(text.as_bytes()).is_ok());
}

#[cfg(feature = "emulate")]
mod emulated {
    use super::*;

    fn tiny() -> Subject {
        Subject::shape("tiny", config(&goldens().join("routing/model")))
    }

    /// On a device the weights are made there, and a decode step waits for nothing but its results.
    #[test]
    fn a_shape_runs_on_a_device() {
        let settings = RouterSettings::default();
        let routed = Way { routing: Some(random_gates(settings, &[1, 2], 0.5)) };
        let plan = Plan {
            prompts: vec![12],
            generated: vec![3],
            ..plan(tiny(), setting(Device::Emulated(1), Some(DType::F16)), vec![Way::DENSE, routed])
        };
        for row in rows(&plan) {
            check(&row);
            assert_eq!((row.head.dtype.as_str(), row.head.model.as_str()), ("f16", "tiny"));
            let decode = row.decode.unwrap();
            // The tokens of each step, and the counts of the one before.
            assert_eq!((decode.replays, decode.launches, (decode.syncs * 3.0).round()), (1.0, 1.0, 5.0));
        }
    }

    #[test]
    fn every_op_is_measured_on_a_device() {
        check_ops(&ops(tiny(), setting(Device::Emulated(1), Some(DType::BF16)), vec![5], 9), &[5]);
    }
}
