//! The K/V of all sequences: pages in one pool, and which page of a (layer, sequence) stands where.
//!
//! A page holds, for each K/V head, V as `[PAGE, head_dim]` and then K transposed as `[head_dim, PAGE]`, in f32. So both
//! products of attention run along contiguous memory: scores over 64 keys at a time, outputs over the head.

use std::ops::Range;

use memmap2::MmapMut;

use crate::backend::{KvLayout, PAGE};
use crate::error::{Error, Kind, Result};

pub struct KvPool {
    pub layout: KvLayout,
    /// `[pages, kv_heads, 2 · PAGE · head_dim]`, f32
    data: MmapMut,
    /// `[pages, PAGE]`: original positions
    positions: Vec<u32>,
    /// `[layers, slots, pages_per_seq]`
    tables: Vec<u32>,
    /// `[layers, slots]`: rows held
    lens: Vec<usize>,
}

/// Memory that is zero, and not there before it is touched. Errors: Memory.
pub fn zeroed(bytes: usize) -> Result<MmapMut> {
    // An empty mapping is an error.
    let map = MmapMut::map_anon(bytes.max(1)).map_err(|e| {
        Error::new(Kind::Memory, format!("{bytes} bytes cannot be had: {e}"))
            .action("lower --context, --chunk or --memory")
    })?;
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage); // a wish; fewer misses of the address cache
    Ok(map)
}

impl KvPool {
    pub fn new(layout: KvLayout) -> Result<Self> {
        let entries = layout.layers * layout.slots;
        Ok(KvPool {
            data: zeroed(layout.pages * layout.kv_heads * head_floats(layout.head_dim) * 4)?,
            positions: vec![0; layout.pages * PAGE],
            tables: vec![0; entries * layout.pages_per_seq],
            lens: vec![0; entries],
            layout,
        })
    }

    pub fn len(&self, layer: usize, slot: usize) -> usize {
        self.lens[self.entry(layer, slot)]
    }

    pub fn set_len(&mut self, layer: usize, slot: usize, rows: usize) {
        let entry = self.entry(layer, slot);
        self.lens[entry] = rows;
    }

    /// Sets the pages of (layer, slot) from `first` on.
    pub fn set_pages(&mut self, layer: usize, slot: usize, first: usize, pages: &[u32]) {
        let start = self.entry(layer, slot) * self.layout.pages_per_seq + first;
        self.tables[start..start + pages.len()].copy_from_slice(pages);
    }

    /// The page table of (layer, slot).
    pub fn table(&self, layer: usize, slot: usize) -> &[u32] {
        &self.tables[self.entry(layer, slot) * self.layout.pages_per_seq..][..self.layout.pages_per_seq]
    }

    /// The original position of a row.
    pub fn position(&self, layer: usize, slot: usize, row: usize) -> u32 {
        self.positions[self.table(layer, slot)[row / PAGE] as usize * PAGE + row % PAGE]
    }

    /// V as `[PAGE, head_dim]`, then K as `[head_dim, PAGE]`, of a page and head.
    pub fn head(&self, page: u32, head: usize) -> &[f32] {
        &self.floats()[self.head_range(page, head)]
    }

    fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.data)
    }

    /// Writes a row: K and V of all heads, `[kv_heads · head_dim]` each.
    pub fn write(&mut self, layer: usize, slot: usize, row: usize, position: u32, k: &[f32], v: &[f32]) {
        let (page, at, d) = (self.table(layer, slot)[row / PAGE], row % PAGE, self.layout.head_dim);
        self.positions[page as usize * PAGE + at] = position;
        for (head, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            let range = self.head_range(page, head);
            let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut self.data);
            let (vs, ks) = floats[range].split_at_mut(PAGE * d);
            vs[at * d..][..d].copy_from_slice(v);
            for (column, k) in ks[at..].iter_mut().step_by(PAGE).zip(k) {
                *column = *k;
            }
        }
    }

    fn head_range(&self, page: u32, head: usize) -> Range<usize> {
        let size = head_floats(self.layout.head_dim);
        let start = (page as usize * self.layout.kv_heads + head) * size;
        start..start + size
    }

    fn entry(&self, layer: usize, slot: usize) -> usize {
        layer * self.layout.slots + slot
    }
}

/// K and V of one head in one page.
fn head_floats(head_dim: usize) -> usize {
    2 * PAGE * head_dim
}
