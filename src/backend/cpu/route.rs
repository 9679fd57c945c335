//! Routing: which rows are active, where their K/V go, and what they see. One pass over integers, on one thread.

use super::kv_pool::KvPool;
use crate::backend::{Decide, Route, Take, UNDECIDED, mean, sigmoid, top_count};

/// The integer arena, read and written at `Ints`.
pub struct Inputs<'a> {
    pub ints: &'a mut [u32],
    pub logits: &'a [f32],
    pub kv: &'a mut KvPool,
    /// To reuse.
    pub active: &'a mut Vec<bool>,
    pub order: &'a mut Vec<u32>,
}

pub fn route(args: &Route, io: Inputs) {
    let Inputs { ints, logits, kv, active, order } = io;
    let rows = args.pos.len;
    let seqs = args.slots.len;
    active.clear();
    active.resize(rows, true);

    for seq in 0..seqs {
        let range = ints[args.seq_start.offset + seq] as usize..ints[args.seq_start.offset + seq + 1] as usize;
        let (active, logits) = (&mut active[range.clone()], logits.get(range).unwrap_or_default());
        match args.decide {
            Decide::All => {}
            Decide::Threshold(threshold) => {
                active.iter_mut().zip(logits).for_each(|(active, &x)| *active = sigmoid(x) >= threshold);
            }
            Decide::TopK(share) => top_k(share, logits, active, order),
            Decide::Sequence(threshold) => {
                let decided = &mut ints[args.decided.offset + seq];
                if *decided == UNDECIDED {
                    *decided = u32::from(sigmoid(mean(logits)) >= threshold);
                }
                active.fill(*decided == 1);
            }
        }
    }

    let mut found = 0;
    for cut in 0..args.cuts.len {
        let start = if cut == 0 { 0 } else { ints[args.cuts.offset + cut - 1] };
        for row in start..ints[args.cuts.offset + cut] {
            if active[row as usize] {
                ints[args.active.offset + found] = row;
                found += 1;
            }
        }
        ints[args.active_at.offset + cut] = found as u32;
    }

    let (mut query, mut kept) = (0, 0);
    for seq in 0..seqs {
        let range = ints[args.seq_start.offset + seq] as usize..ints[args.seq_start.offset + seq + 1] as usize;
        let slot = ints[args.slots.offset + seq] as usize;
        let old = kv.len(args.layer, slot);
        let mut len = old;
        // Positions of the rows that this step keeps; those of earlier steps stand in their pages.
        order.clear();
        let mut first = None;
        for row in range {
            let position = ints[args.pos.offset + row];
            if args.keys == Take::All || active[row] {
                ints[args.kv_row.offset + kept] = len as u32;
                order.push(position);
                (len, kept) = (len + 1, kept + 1);
            }
            if args.queries == Take::All || active[row] {
                if let Some(window) = args.window {
                    let out_of_sight = |p: u32| p as usize + window <= position as usize;
                    // Positions ascend: the first query of a sequence searches, the others go on from there.
                    let mut start =
                        first.unwrap_or_else(|| search(old, |r| out_of_sight(kv.position(args.layer, slot, r))));
                    while start >= old && start < len && out_of_sight(order[start - old])
                        || start < old && out_of_sight(kv.position(args.layer, slot, start))
                    {
                        start += 1;
                    }
                    first = Some(start);
                }
                ints[args.first.offset + query] = first.unwrap_or(0) as u32;
                ints[args.end.offset + query] = len as u32;
                query += 1;
            }
        }
        kv.set_len(args.layer, slot, len);
    }
}

/// The first of `0..n` for which `below` does not hold; it holds for a prefix.
fn search(n: usize, below: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = low.midpoint(high);
        if below(middle) { low = middle + 1 } else { high = middle }
    }
    low
}

/// Marks the ceil(share·T) highest logits, of equals the earlier ones. A NaN ranks last.
fn top_k(share: f32, logits: &[f32], active: &mut [bool], order: &mut Vec<u32>) {
    let wanted = top_count(share, logits.len());
    active.fill(false);
    order.clear();
    order.extend(0..logits.len() as u32);
    // Adding 0 makes −0 a 0, which equals it.
    let key = |i: u32| if logits[i as usize].is_nan() { f32::NEG_INFINITY } else { logits[i as usize] + 0.0 };
    if wanted < order.len() {
        order.select_nth_unstable_by(wanted, |&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
    }
    order[..wanted].iter().for_each(|&i| active[i as usize] = true);
}
