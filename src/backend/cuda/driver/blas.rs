//! Products through cuBLASLt.
//!
//! Row-major `out[m, n] = src[m, k] · weight[n, k]ᵀ` is, in the column-major terms of BLAS, `outᵀ[n, m] = op(weight) · src`
//! with weight `[k, n]` transposed and src `[k, m]` as it is: nothing moves. Backward, `src[m, k] · weight[k, n]` is
//! `outᵀ[n, m] = weight · src` with weight `[n, k]` as it is, too.
//!
//! Asking which algorithm is best takes longer than a small product. So it is asked once for each bucket of m, and each
//! exact m is only checked against the bucket's algorithm the first time it comes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::mem::size_of;
use std::ptr;

use cudarc::cublaslt::sys::{self, cublasStatus_t as Status};

use super::probe;
use super::status::Owned;
use crate::backend::cuda::device::{Address, Gemm};
use crate::error::{Error, Kind, Result};
use crate::tensor::DType;

/// A failed call of cuBLASLt: its status, and what was being done.
pub(super) struct Failure(pub Status, pub &'static str);

type Product = Owned<sys::cublasLtMatmulDesc_t, Status>;
type Layout = Owned<sys::cublasLtMatrixLayout_t, Status>;

pub(super) struct Blas {
    plans: HashMap<Key, Plan>,
    library: Library,
    workspace: Address,
}

struct Library {
    /// f32 accumulation, with weight transposed, and backward as it is. f32 inputs are not rounded to TF32 either.
    products: [Product; 2],
    handle: Owned<sys::cublasLtHandle_t, Status>,
    /// Bytes that a product may use beside its matrices.
    workspace: usize,
}

/// Products that share an algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// m, rounded up.
    bucket: usize,
    n: usize,
    k: usize,
    dtype: DType,
    out_dtype: DType,
    add: bool,
    backward: bool,
    /// Bytes that all three addresses are multiples of: 16, or a smaller power of two.
    align: u32,
}

struct Plan {
    weight: Layout,
    src: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// The m that `src` and `out` stand at.
    m: usize,
    /// Which m of the bucket the algorithm takes: bit `bucket - m`.
    taken: [u64; 4],
}

/// The m that the heuristic is asked about in place of `m`.
fn bucket(m: usize) -> usize {
    if m <= 1024 { m.next_multiple_of(64) } else { m.next_multiple_of(256) }
}

impl Blas {
    /// In the current context. Errors: Device.
    pub fn new(workspace: Address, workspace_bytes: usize) -> Result<Blas> {
        let version = probe::cublaslt()?;
        let failed = |Failure(status, doing): Failure| {
            let cause = format!("{status:?}, from cuBLASLt {}", version_text(version));
            let error = Error::new(Kind::Device, cause).during(doing);
            error.action("use a cuBLAS that is not newer than the driver, see mindskip doctor")
        };
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle, which `Owned` gives back.
        let handle = unsafe {
            ok(sys::cublasLtCreate(&mut handle), "opening cuBLASLt").map_err(failed)?;
            Owned(handle, sys::cublasLtDestroy as unsafe fn(sys::cublasLtHandle_t) -> Status)
        };
        let products = [describe(true).map_err(failed)?, describe(false).map_err(failed)?];
        let library = Library { products, handle, workspace: workspace_bytes };
        Ok(Blas { plans: HashMap::new(), library, workspace })
    }

    /// Sends a product to the stream.
    ///
    /// # Safety
    /// The addresses point to memory of the current context's device that is large enough; the stream is of that context.
    pub unsafe fn multiply(&mut self, gemm: &Gemm, stream: sys::cudaStream_t) -> Result<(), Failure> {
        let &Gemm { weight, src, out, m, n, k, dtype, out_dtype, add, backward } = gemm;
        let align = 1 << (weight.0 | src.0 | out.0).trailing_zeros().min(4);
        let key = Key { bucket: bucket(m), n, k, dtype, out_dtype, add, backward, align };
        let plan = match self.plans.entry(key) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => place.insert(self.library.plan(&key)?),
        };
        plan.stand_at(m)?;
        let bit = key.bucket - m;
        if plan.taken[bit / 64] >> (bit % 64) & 1 == 0 {
            self.library.admit(plan, &key)?;
            plan.taken[bit / 64] |= 1 << (bit % 64);
        }
        let (one, beta) = (1f32, if add { 1f32 } else { 0f32 });
        // SAFETY: the layouts describe the matrices that the caller vouches for, and the workspace lives as long as this.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.library.handle.0,
                self.library.product(&key),
                (&raw const one).cast(),
                pointer(weight),
                plan.weight.0,
                pointer(src),
                plan.src.0,
                (&raw const beta).cast(),
                pointer(out),
                plan.out.0,
                pointer(out).cast_mut(),
                plan.out.0,
                &plan.algorithm,
                pointer(self.workspace).cast_mut(),
                self.library.workspace,
                stream,
            )
        };
        ok(status, "multiplying")
    }
}

impl Library {
    fn product(&self, key: &Key) -> sys::cublasLtMatmulDesc_t {
        self.products[usize::from(key.backward)].0
    }

    /// Sees to it that the plan's algorithm takes the m that it stands at: where it does not, one is asked for that does.
    fn admit(&self, plan: &mut Plan, key: &Key) -> Result<(), Failure> {
        let (weight, src, out) = (plan.weight.0, plan.src.0, plan.out.0);
        let (handle, product, algorithm) = (self.handle.0, self.product(key), &plan.algorithm);
        let mut result = no_result();
        // SAFETY: all handles live; `result` is written.
        let status =
            unsafe { sys::cublasLtMatmulAlgoCheck(handle, product, weight, src, out, out, algorithm, &mut result) };
        if status != Status::CUBLAS_STATUS_SUCCESS || result.workspaceSize > self.workspace {
            (plan.algorithm, plan.taken) = (self.ask(key, weight, src, out)?, [0; 4]);
        }
        Ok(())
    }

    fn plan(&self, key: &Key) -> Result<Plan, Failure> {
        let (rows, columns) = if key.backward { (key.n, key.k) } else { (key.k, key.n) };
        let weight = layout(key.dtype, rows, columns)?;
        let src = layout(key.dtype, key.k, key.bucket)?;
        let out = layout(key.out_dtype, key.n, key.bucket)?;
        let algorithm = self.ask(key, weight.0, src.0, out.0)?;
        Ok(Plan { weight, src, out, algorithm, m: key.bucket, taken: [0; 4] })
    }

    /// The algorithm that cuBLASLt thinks best for these layouts.
    fn ask(
        &self,
        key: &Key,
        weight: sys::cublasLtMatrixLayout_t,
        src: sys::cublasLtMatrixLayout_t,
        out: sys::cublasLtMatrixLayout_t,
    ) -> Result<sys::cublasLtMatmulAlgo_t, Failure> {
        const ASKING: &str = "choosing an algorithm for a product";
        /// CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: parts of a split k are added up in f32, never in the type of `out`.
        const REDUCE_IN_F32: u32 = 2;
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut wish = ptr::null_mut();
        // SAFETY: all handles live, `wish` is given back by `Owned`; the workspace's size is a u64, the other attributes
        // are u32; one result is asked for and room for one is given.
        unsafe {
            ok(sys::cublasLtMatmulPreferenceCreate(&mut wish), ASKING)?;
            let wish = Owned(
                wish,
                sys::cublasLtMatmulPreferenceDestroy as unsafe fn(sys::cublasLtMatmulPreference_t) -> Status,
            );
            let set = |which, value: *const c_void, size| {
                ok(sys::cublasLtMatmulPreferenceSetAttribute(wish.0, which, value, size), ASKING)
            };
            let room = self.workspace as u64;
            set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const room).cast(), 8)?;
            let reduce = REDUCE_IN_F32;
            set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reduce).cast(), 4)?;
            for which in [
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                set(which, (&raw const key.align).cast(), 4)?;
            }
            let (mut result, mut found) = (no_result(), 0);
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle.0,
                self.product(key),
                weight,
                src,
                out,
                out,
                wish.0,
                1,
                &mut result,
                &mut found,
            );
            ok(status, ASKING)?;
            ok(if found < 1 { Status::CUBLAS_STATUS_NOT_SUPPORTED } else { result.state }, ASKING)?;
            Ok(result.algo)
        }
    }
}

impl Plan {
    /// Makes the layouts those of an exact m.
    fn stand_at(&mut self, m: usize) -> Result<(), Failure> {
        if self.m == m {
            return Ok(());
        }
        self.m = 0; // of no bucket, should one of the calls fail
        let (columns, size) = (m as u64, size_of::<u64>());
        for layout in [&self.src, &self.out] {
            let which = sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
            // SAFETY: the layout lives; the attribute is a u64.
            let status =
                unsafe { sys::cublasLtMatrixLayoutSetAttribute(layout.0, which, (&raw const columns).cast(), size) };
            ok(status, "describing a matrix")?;
        }
        self.m = m;
        Ok(())
    }
}

/// A product with f32 accumulation.
fn describe(transposed: bool) -> Result<Product, Failure> {
    const DESCRIBING: &str = "describing a product";
    let mut product = ptr::null_mut();
    let (sum, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, data_type(DType::F32));
    // SAFETY: writes one handle, which `Owned` gives back; the attribute is an i32 as documented.
    unsafe {
        ok(sys::cublasLtMatmulDescCreate(&mut product, sum, scale), DESCRIBING)?;
        let product = Owned(product, sys::cublasLtMatmulDescDestroy as unsafe fn(sys::cublasLtMatmulDesc_t) -> Status);
        let operation = i32::from(transposed); // CUBLAS_OP_N is 0, CUBLAS_OP_T 1
        let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        ok(sys::cublasLtMatmulDescSetAttribute(product.0, which, (&raw const operation).cast(), 4), DESCRIBING)?;
        Ok(product)
    }
}

/// A column-major matrix without gaps.
fn layout(dtype: DType, rows: usize, cols: usize) -> Result<Layout, Failure> {
    let mut layout = ptr::null_mut();
    // SAFETY: writes one handle, which is given back by `Owned`.
    let status = unsafe {
        sys::cublasLtMatrixLayoutCreate(&mut layout, data_type(dtype), rows as u64, cols as u64, rows as i64)
    };
    ok(status, "describing a matrix")?;
    Ok(Owned(layout, sys::cublasLtMatrixLayoutDestroy))
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

fn no_result() -> sys::cublasLtMatmulHeuristicResult_t {
    sys::cublasLtMatmulHeuristicResult_t {
        algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspaceSize: 0,
        state: Status::CUBLAS_STATUS_NOT_SUPPORTED,
        wavesCount: 0.0,
        reserved: [0; 4],
    }
}

fn pointer(address: Address) -> *const c_void {
    address.0 as *const c_void
}

/// 130001 is "13.0.1", 120402 is "12.4.2".
pub fn version_text(version: usize) -> String {
    format!("{}.{}.{}", version / 10000, version % 10000 / 100, version % 100)
}

fn ok(status: Status, doing: &'static str) -> Result<(), Failure> {
    if status == Status::CUBLAS_STATUS_SUCCESS { Ok(()) } else { Err(Failure(status, doing)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_m_has_a_bit_in_its_bucket() {
        for m in 1..5000 {
            let bucket = bucket(m);
            assert!(bucket >= m && bucket - m < 256, "{m} in {bucket}");
        }
        assert_eq!([1, 64, 65, 1024, 1025].map(bucket), [64, 64, 128, 1024, 1280]);
    }

    #[test]
    fn versions_are_written_as_people_do() {
        assert_eq!([130001, 120402, 130400].map(version_text), ["13.0.1", "12.4.2", "13.4.0"]);
    }
}
