//! The bench measures what it says it does.

mod common;

use std::ops::ControlFlow;

use common::*;
use mindskip::Kind;
use mindskip::backend::OpKind;
use mindskip::bench::{OpRow, OpsPlan, Phase, Plan, Row, Setting, Subject, Way, measure, measure_ops};
use mindskip::bundle::Bundle;
use mindskip::engine::{Device, Kernels, Precision};
use mindskip::model::Routing;
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
    let names: Vec<&str> = OpKind::ALL.iter().map(|kind| kind.name()).collect();
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
        check_ops(&ops(tiny(), setting(Device::Emulated(1), Some(DType::BF16)), vec![1, 5], 9), &[1, 5]);
    }
}
