//! The books of the ragged KV cache: which pages each (layer, sequence) holds. The K/V themselves live in the backend.
//!
//! One pool of pages serves all layers. A (layer, sequence) takes pages as its rows are written and gives them back when
//! the sequence ends, so what is not written (skipped sequences; skipped tokens with `keys=active`) takes no page.

use crate::backend::{KvLayout, PAGE};
use crate::error::{Error, Kind, Result};

/// A sequence's place in the cache, from [`KvCache::open`] until [`KvCache::close`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub(crate) u32);

impl Slot {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Page tables and lengths by (layer, slot), and the free list.
#[derive(Debug)]
pub struct KvCache {
    layout: KvLayout,
    /// Pages nobody holds; the last one goes out first, so memory that was touched is used again.
    free: Vec<u32>,
    /// Free slots, likewise.
    free_slots: Vec<u32>,
    /// `[slots]`
    open: Vec<bool>,
    /// `[layers · slots]`: pages in order; row r stands in page r / PAGE.
    tables: Vec<Vec<u32>>,
    /// `[layers · slots]`: rows held.
    lens: Vec<usize>,
}

impl KvCache {
    /// An empty cache; allocates its tables once.
    pub fn new(layout: KvLayout) -> Self {
        let entries = layout.layers * layout.slots;
        KvCache {
            layout,
            free: (0..layout.pages as u32).rev().collect(),
            free_slots: (0..layout.slots as u32).rev().collect(),
            open: vec![false; layout.slots],
            tables: (0..entries).map(|_| Vec::with_capacity(layout.pages_per_seq)).collect(),
            lens: vec![0; entries],
        }
    }

    /// Takes a slot for a new sequence. Errors: Memory when all are open.
    pub fn open(&mut self) -> Result<Slot> {
        let slot = self.free_slots.pop().ok_or_else(|| {
            Error::new(Kind::Memory, format!("all {} sequences of the KV cache are in use", self.layout.slots))
                .action("release a sequence or build the engine for a larger batch")
        })?;
        self.open[slot as usize] = true;
        Ok(Slot(slot))
    }

    /// Gives a sequence's pages and its slot back. Closing twice has no effect.
    pub fn close(&mut self, slot: Slot) {
        if !std::mem::take(&mut self.open[slot.index()]) {
            return;
        }
        for layer in 0..self.layout.layers {
            self.truncate(layer, slot, 0);
        }
        self.free_slots.push(slot.0);
    }

    /// Makes room for `rows` rows of (layer, slot) in all. Returns the first new entry of its page table and the new pages,
    /// for the backend. Errors: Memory, with nothing taken, when the pool or the table is too small.
    pub fn reserve(&mut self, layer: usize, slot: Slot, rows: usize) -> Result<(usize, &[u32])> {
        let entry = self.entry(layer, slot);
        let table = &mut self.tables[entry];
        let (held, wanted) = (table.len(), rows.div_ceil(PAGE));
        if wanted > self.layout.pages_per_seq {
            return Err(Error::new(
                Kind::Memory,
                format!("{rows} tokens exceed the context of {} planned for", self.layout.pages_per_seq * PAGE),
            )
            .action("raise --context, or shorten the prompt or --max-tokens"));
        }
        let new = wanted.saturating_sub(held);
        if new > self.free.len() {
            return Err(Error::new(
                Kind::Memory,
                format!(
                    "the KV cache is full: {new} more pages of {PAGE} rows are needed, {} of {} are free",
                    self.free.len(),
                    self.layout.pages
                ),
            )
            .action("raise --kv-tokens or --memory, or use fewer or shorter sequences"));
        }
        table.extend(self.free.drain(self.free.len() - new..).rev());
        Ok((held, &table[held..]))
    }

    /// Records that (layer, slot) holds `rows` rows; room for them was reserved.
    pub fn set_len(&mut self, layer: usize, slot: Slot, rows: usize) {
        let entry = self.entry(layer, slot);
        assert!(rows <= self.tables[entry].len() * PAGE, "{rows} rows without pages");
        self.lens[entry] = rows;
    }

    /// Forgets the rows from `rows` on and returns the pages that only they took.
    pub fn truncate(&mut self, layer: usize, slot: Slot, rows: usize) {
        let entry = self.entry(layer, slot);
        self.lens[entry] = self.lens[entry].min(rows);
        let keep = rows.div_ceil(PAGE).min(self.tables[entry].len());
        self.free.extend(self.tables[entry].drain(keep..).rev());
    }

    /// Rows that (layer, slot) holds.
    pub fn len(&self, layer: usize, slot: Slot) -> usize {
        self.lens[self.entry(layer, slot)]
    }

    /// Pages in use, of `layout().pages`.
    pub fn pages_in_use(&self) -> usize {
        self.layout.pages - self.free.len()
    }

    /// Whether no sequence is open.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.free_slots.len() == self.layout.slots
    }

    fn entry(&self, layer: usize, slot: Slot) -> usize {
        layer * self.layout.slots + slot.index()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};

    const LAYERS: usize = 3;
    const SLOTS: usize = 4;

    fn layout(pages: usize) -> KvLayout {
        KvLayout { layers: LAYERS, slots: SLOTS, pages, pages_per_seq: 5, kv_heads: 1, head_dim: 8, dtype: DType::F32 }
    }

    #[derive(Debug, Clone)]
    enum Act {
        Open,
        Close(usize),
        Grow(usize, usize, usize),
        Truncate(usize, usize, usize),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            2 => Just(Act::Open),
            1 => (0..SLOTS).prop_map(Act::Close),
            6 => (0..LAYERS, 0..SLOTS, 0..400usize).prop_map(|(l, s, n)| Act::Grow(l, s, n)),
            1 => (0..LAYERS, 0..SLOTS, 0..400usize).prop_map(|(l, s, n)| Act::Truncate(l, s, n)),
        ]
    }

    proptest! {
        /// Against a naive model: lengths agree, pages are held by one entry at a time and exactly as many as the rows
        /// need, errors come exactly when the pool or the table is too small and change nothing.
        #[test]
        fn agrees_with_a_naive_model(pages in 0..40usize, acts in prop::collection::vec(act(), 1..80)) {
            let mut kv = KvCache::new(layout(pages));
            let mut naive: HashMap<u32, [usize; LAYERS]> = HashMap::new();
            for act in acts {
                let used = |naive: &HashMap<u32, [usize; LAYERS]>| -> usize {
                    naive.values().flatten().map(|n| n.div_ceil(PAGE)).sum()
                };
                match act {
                    Act::Open => match kv.open() {
                        Ok(slot) => prop_assert!(naive.insert(slot.0, [0; LAYERS]).is_none()),
                        Err(e) => {
                            prop_assert_eq!(e.kind(), Kind::Memory);
                            prop_assert_eq!(naive.len(), SLOTS);
                        }
                    },
                    Act::Close(s) => {
                        kv.close(Slot(s as u32));
                        naive.remove(&(s as u32));
                    }
                    Act::Grow(l, s, n) => {
                        let Some(lens) = naive.get(&(s as u32)) else { continue };
                        let rows = lens[l].max(n);
                        let more = rows.div_ceil(PAGE) - lens[l].div_ceil(PAGE);
                        let fits = rows.div_ceil(PAGE) <= 5 && used(&naive) + more <= pages;
                        match kv.reserve(l, Slot(s as u32), rows) {
                            Ok((first, new)) => {
                                prop_assert!(fits);
                                prop_assert_eq!((first, new.len()), (lens[l].div_ceil(PAGE), more));
                                kv.set_len(l, Slot(s as u32), rows);
                                naive.get_mut(&(s as u32)).unwrap()[l] = rows;
                            }
                            Err(_) => prop_assert!(!fits),
                        }
                    }
                    Act::Truncate(l, s, n) => {
                        let Some(lens) = naive.get_mut(&(s as u32)) else { continue };
                        kv.truncate(l, Slot(s as u32), n);
                        lens[l] = lens[l].min(n);
                    }
                }
                prop_assert_eq!(kv.pages_in_use(), used(&naive));
                prop_assert_eq!(kv.is_empty(), naive.is_empty());
                let mut seen: HashSet<u32> = kv.free.iter().copied().collect();
                for (&slot, lens) in &naive {
                    for (l, &n) in lens.iter().enumerate() {
                        prop_assert_eq!(kv.len(l, Slot(slot)), n);
                        for &page in &kv.tables[kv.entry(l, Slot(slot))] {
                            prop_assert!(seen.insert(page), "page {} is held twice", page);
                        }
                    }
                }
                prop_assert_eq!(seen.len(), pages);
            }
        }
    }
}
