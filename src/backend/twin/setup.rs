//! Building cases: placing buffers between poison, filling them with the same numbers everywhere, K/V on shuffled pages.

use std::ops::Range;

use half::{bf16, f16};

use super::Types;
use super::reference::store;
use crate::backend::*;
use crate::tensor::{Bytes, Tensor};

/// A run of some ops, as data.
pub struct Case {
    pub name: String,
    pub kv: KvLayout,
    /// The arena before, in halves of 16 bits.
    pub halves: Vec<u16>,
    pub ints: Vec<u32>,
    /// By [`Weight::id`]; those with a noise are made by the backend itself.
    pub tensors: Vec<(Tensor, Option<Noise>)>,
    pub held: Vec<Held>,
    /// Ops that prepare (fill the K/V), the op in question, and ops that show what it left in the K/V.
    pub before: Vec<Op>,
    pub op: AnyOp,
    pub after: Vec<Op>,
    /// All buffers, in order.
    pub mats: Vec<Mat>,
    pub int_buffers: Vec<Ints>,
    /// Parts of them that may hold anything afterwards.
    pub scratch: Vec<Mat>,
}

impl Case {
    pub fn ops(&self) -> impl Iterator<Item = AnyOp> {
        let any = |op: &Op| AnyOp::from(*op);
        self.before.iter().map(any).chain([self.op]).chain(self.after.iter().map(any))
    }
}

/// The K/V of a (layer, slot) before the step: how many rows count, and the pages for them and those to come.
pub struct Held {
    pub layer: usize,
    pub slot: usize,
    pub rows: usize,
    pub pages: Vec<u32>,
}

/// How the number of rows of a set is given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Count {
    /// By the host.
    Host,
    /// On the device, of a bound that is higher by so much.
    Device(usize),
}

/// A case in the making.
pub struct Setup {
    pub types: Types,
    layers: usize,
    slots: usize,
    kv_heads: usize,
    head_dim: usize,
    halves: Vec<u16>,
    ints: Vec<u32>,
    tensors: Vec<(Tensor, Option<Noise>)>,
    held: Vec<Held>,
    pages: usize,
    mats: Vec<Mat>,
    int_buffers: Vec<Ints>,
    pub scratch: Vec<Mat>,
    pub before: Vec<Op>,
    pub after: Vec<Op>,
}

/// A quiet NaN in every dtype at once, and different at every place: what is read where it should not be shows in the
/// results, what is written does not look untouched.
fn poison(at: usize) -> u16 {
    0x7fc0 | (mix(at as u64) & 0x3f) as u16
}

/// The same for integers: as an index it is beyond everything.
fn poison_int(at: usize) -> u32 {
    0xdead_0000 | at as u32 & 0xffff
}

/// A number from [-1, 1) that depends on nothing but its arguments: a row has the same values in every case.
pub fn noise(tag: &str, row: usize, col: usize) -> f32 {
    let tag = tag.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
    let bits = mix(mix(tag ^ row as u64) ^ col as u64) >> 40;
    bits as f32 / (1 << 23) as f32 - 1.0
}

/// An activation: the mean is not zero.
pub fn activation(row: usize, col: usize) -> f32 {
    0.4 + 1.2 * noise("activation", row, col)
}

/// Row numbers with gaps: 1, 2, 4, 5, 7, 8, ...
pub fn spread(n: usize) -> Vec<u32> {
    (0..n).map(|i| (3 * i / 2 + 1) as u32).collect()
}

impl Setup {
    /// For ops that have nothing to do with K/V.
    pub fn new(types: Types) -> Self {
        Setup::with_kv(types, 1, 1, 1, types.head_dim(2))
    }

    pub fn with_kv(types: Types, layers: usize, slots: usize, kv_heads: usize, head_dim: usize) -> Self {
        let mut setup = Setup {
            types,
            layers,
            slots,
            kv_heads,
            head_dim,
            halves: Vec::new(),
            ints: Vec::new(),
            tensors: Vec::new(),
            held: Vec::new(),
            pages: 0,
            mats: Vec::new(),
            int_buffers: Vec::new(),
            scratch: Vec::new(),
            before: Vec::new(),
            after: Vec::new(),
        };
        // Something in front of the first buffer and behind the last.
        setup.mat(1, 1, DType::F32);
        setup.room(1);
        setup
    }

    pub fn case(mut self, name: String, op: impl Into<AnyOp>) -> Case {
        // Pages are shuffled over a pool that is larger than what is held; 7 and its size have no common factor.
        let pages = (self.pages + 3).next_multiple_of(7) + 1;
        for page in self.held.iter_mut().flat_map(|h| &mut h.pages) {
            *page = ((*page as usize * 7 + 5) % pages) as u32;
        }
        let kv = KvLayout {
            layers: self.layers,
            slots: self.slots,
            pages,
            pages_per_seq: self.held.iter().map(|h| h.pages.len()).max().unwrap_or(0) + 1,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            dtype: self.types.kv,
        };
        Case {
            name,
            kv,
            halves: self.halves,
            ints: self.ints,
            tensors: self.tensors,
            held: self.held,
            before: self.before,
            op: op.into(),
            after: self.after,
            mats: self.mats,
            int_buffers: self.int_buffers,
            scratch: self.scratch,
        }
    }

    /// A matrix of poison, with more of it behind.
    pub fn mat(&mut self, rows: usize, cols: usize, dtype: DType) -> Mat {
        let mat = Mat { offset: 2 * self.halves.len(), rows, cols, dtype };
        let end = (mat.offset + mat.bytes() + ALIGN).next_multiple_of(ALIGN);
        self.halves.extend((mat.offset / 2..end / 2).map(poison));
        self.mats.push(mat);
        mat
    }

    /// A matrix of activations, in their dtype.
    pub fn activations(&mut self, rows: usize, cols: usize) -> Mat {
        self.mat(rows, cols, self.types.activations)
    }

    pub fn set(&mut self, mat: Mat, row: usize, col: usize, value: f32) {
        assert!(row < mat.rows && col < mat.cols);
        store(&mut self.halves, mat, row * mat.cols + col, value.into());
    }

    pub fn fill_row(&mut self, mat: Mat, row: usize, value: impl Fn(usize) -> f32) {
        (0..mat.cols).for_each(|col| self.set(mat, row, col, value(col)));
    }

    /// Fills the first rows with the activations of the given ones.
    #[cfg(test)]
    pub fn fill(&mut self, mat: Mat, ids: impl IntoIterator<Item = usize>) {
        ids.into_iter().enumerate().for_each(|(i, id)| self.fill_row(mat, i, |col| activation(id, col)));
    }

    /// Room for integers, poisoned.
    pub fn room(&mut self, len: usize) -> Ints {
        let ints = Ints { offset: self.ints.len(), len };
        let end = (ints.offset + len + 1).next_multiple_of(ALIGN / 4);
        self.ints.extend((ints.offset..end).map(poison_int));
        self.int_buffers.push(ints);
        ints
    }

    pub fn ints(&mut self, values: &[u32]) -> Ints {
        let ints = self.room(values.len());
        self.ints[ints.offset..][..values.len()].copy_from_slice(values);
        ints
    }

    pub fn set_int(&mut self, ints: Ints, i: usize, value: u32) {
        assert!(i < ints.len);
        self.ints[ints.offset + i] = value;
    }

    /// A set of rows; beyond the count the index is poison.
    pub fn rows(&mut self, index: &[u32], count: Count) -> RowSet {
        match count {
            Count::Host => {
                // Half of the rows that follow each other are said to.
                let run = index.first().filter(|_| index.len() % 2 == 1).map(|&first| first as usize);
                let run = run.filter(|run| index.iter().zip(*run..).all(|(&row, i)| row as usize == i));
                RowSet { run, ..RowSet::exact(self.ints(index)) }
            }
            Count::Device(more) => {
                let bound = index.len() + more;
                let room = self.room(bound);
                self.ints[room.offset..][..index.len()].copy_from_slice(index);
                let count = self.ints(&[index.len() as u32]);
                RowSet { count: Some(count), ..RowSet::exact(room) }
            }
        }
    }

    pub fn tensor(&mut self, rows: usize, cols: usize, dtype: DType, value: impl Fn(usize, usize) -> f32) -> Weight {
        let values = (0..rows * cols).map(|i| value(i / cols, i % cols));
        let bytes: Vec<u8> = match dtype {
            DType::F32 => values.flat_map(|x| x.to_le_bytes()).collect(),
            DType::F16 => values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect(),
            DType::BF16 => values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect(),
        };
        self.put(Tensor::new(dtype, rows, cols, Bytes::new(bytes)).expect("so many bytes"), None)
    }

    /// A weight that the backend draws itself.
    pub fn random(&mut self, rows: usize, cols: usize, dtype: DType, noise: Noise) -> Weight {
        self.put(noise.tensor(dtype, rows, cols).expect("so many bytes"), Some(noise))
    }

    fn put(&mut self, tensor: Tensor, noise: Option<Noise>) -> Weight {
        let Tensor { dtype, rows, cols, .. } = tensor;
        self.tensors.push((tensor, noise));
        Weight { id: self.tensors.len() - 1, rows, cols, dtype }
    }

    /// A matrix whose outputs are about as large as its inputs.
    pub fn weight(&mut self, tag: &str, rows: usize, cols: usize, dtype: DType) -> Weight {
        let scale = 1.0 / (cols as f32).sqrt();
        self.tensor(rows, cols, dtype, |row, col| (0.1 + 1.5 * noise(tag, row, col)) * scale)
    }

    /// A norm's weight, or a bias.
    pub fn vector(&mut self, tag: &str, cols: usize, dtype: DType) -> Weight {
        self.tensor(1, cols, dtype, |row, col| 0.5 + noise(tag, row, col))
    }

    /// Pages for `room` rows of (layer, slot), of which `rows` count as held.
    pub fn hold(&mut self, layer: usize, slot: usize, rows: usize, room: usize) {
        let pages: Range<usize> = self.pages..self.pages + room.max(rows).div_ceil(PAGE);
        self.pages = pages.end;
        self.held.push(Held { layer, slot, rows, pages: pages.map(|page| page as u32).collect() });
    }
}
