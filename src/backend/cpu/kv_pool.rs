//! The K/V of all sequences: pages in one pool, and which page of a (layer, sequence) stands where.
//!
//! A page holds, for each K/V head, V as `[PAGE, head_dim]` and then K transposed as `[head_dim, PAGE]`. So both
//! products of attention run along contiguous memory: scores over 64 keys at a time, outputs over the head. In 16 bits
//! the head of a page is widened to f32 on its way into the cache, once for all queries that a task has for it.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::MmapMut;

use crate::backend::{KvLayout, PAGE};
use crate::error::{Error, Kind, Result};
use crate::tensor::DType;

pub struct KvPool {
    pub layout: KvLayout,
    /// `[pages, kv_heads, 2 · PAGE · head_dim]`, in the layout's dtype
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
            data: zeroed(layout.pages * layout.kv_heads * head_numbers(layout.head_dim) * layout.dtype.size())?,
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

    /// V as `[PAGE, head_dim]`, then K as `[head_dim, PAGE]`, of a page and head; in [`room`](Self::room) where they are
    /// not stored in f32.
    #[inline(always)]
    pub fn head<'a>(&'a self, page: u32, head: usize, room: &'a mut [f32]) -> &'a [f32] {
        let range = self.head_range(page, head);
        match self.layout.dtype {
            DType::F32 => return &bytemuck::cast_slice(&self.data)[range],
            DType::F16 => bytemuck::cast_slice::<_, f16>(&self.data)[range].convert_to_f32_slice(room),
            DType::BF16 => bytemuck::cast_slice::<_, bf16>(&self.data)[range].convert_to_f32_slice(room),
        }
        room
    }

    /// Floats that [`head`](Self::head) needs room for.
    pub fn room(&self) -> usize {
        if self.layout.dtype == DType::F32 { 0 } else { head_numbers(self.layout.head_dim) }
    }

    /// Writes a row: K and V of all heads, `[kv_heads · head_dim]` each.
    pub fn write(&mut self, layer: usize, slot: usize, row: usize, position: u32, k: &[f32], v: &[f32]) {
        let (page, at, d) = (self.table(layer, slot)[row / PAGE], row % PAGE, self.layout.head_dim);
        self.positions[page as usize * PAGE + at] = position;
        for (head, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            let range = self.head_range(page, head);
            match self.layout.dtype {
                DType::F32 => put(&mut bytemuck::cast_slice_mut(&mut self.data)[range], at, k, v, |x| x),
                DType::F16 => put(&mut bytemuck::cast_slice_mut(&mut self.data)[range], at, k, v, f16::from_f32),
                DType::BF16 => put(&mut bytemuck::cast_slice_mut(&mut self.data)[range], at, k, v, bf16::from_f32),
            }
        }
    }

    fn head_range(&self, page: u32, head: usize) -> Range<usize> {
        let size = head_numbers(self.layout.head_dim);
        let start = (page as usize * self.layout.kv_heads + head) * size;
        start..start + size
    }

    fn entry(&self, layer: usize, slot: usize) -> usize {
        layer * self.layout.slots + slot
    }
}

/// Writes a row of one head in one page.
fn put<T>(head: &mut [T], at: usize, k: &[f32], v: &[f32], round: impl Fn(f32) -> T) {
    let (vs, ks) = head.split_at_mut(PAGE * v.len());
    vs[at * v.len()..][..v.len()].iter_mut().zip(v).for_each(|(to, &v)| *to = round(v));
    ks[at..].iter_mut().step_by(PAGE).zip(k).for_each(|(to, &k)| *to = round(k));
}

/// K and V of one head in one page.
fn head_numbers(head_dim: usize) -> usize {
    2 * PAGE * head_dim
}
