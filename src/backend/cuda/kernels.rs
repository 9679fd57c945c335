//! The argument structs of the kernels, made from cuda/kernels.h by scripts/kernels-rs.

pub const DECODE_PAGES: u32 = 2;
pub const TYPE_F32: u32 = 0;
pub const TYPE_F16: u32 = 1;
pub const TYPE_BF16: u32 = 2;
pub const KV_PAGE: u32 = 64;
pub const SAMPLE_GROUP: u32 = 16;
pub const SAMPLE_CHUNK: u32 = 2048;
pub const SAMPLE_DRAW: u32 = 6;
pub const SAMPLE_NONE: u32 = 4294967295;
pub const ROUTE_ALL: u32 = 0;
pub const ROUTE_THRESHOLD: u32 = 1;
pub const ROUTE_TOP_K: u32 = 2;
pub const ROUTE_SEQUENCE: u32 = 3;
pub const GATE_ROWS: u32 = 32;
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct WorkCount {
    pub row_calls: u64,
    pub rows: u64,
    pub kv_calls: u64,
    pub kv_rows: u64,
    pub pairs: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of WorkCount"][::core::mem::size_of::<WorkCount>() - 40usize];
    ["Alignment of WorkCount"][::core::mem::align_of::<WorkCount>() - 8usize];
    ["Offset of field: WorkCount::row_calls"][::core::mem::offset_of!(WorkCount, row_calls) - 0usize];
    ["Offset of field: WorkCount::rows"][::core::mem::offset_of!(WorkCount, rows) - 8usize];
    ["Offset of field: WorkCount::kv_calls"][::core::mem::offset_of!(WorkCount, kv_calls) - 16usize];
    ["Offset of field: WorkCount::kv_rows"][::core::mem::offset_of!(WorkCount, kv_rows) - 24usize];
    ["Offset of field: WorkCount::pairs"][::core::mem::offset_of!(WorkCount, pairs) - 32usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RowSet {
    pub index: *const u32,
    pub count: *const u32,
    pub bound: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RowSet"][::core::mem::size_of::<RowSet>() - 24usize];
    ["Alignment of RowSet"][::core::mem::align_of::<RowSet>() - 8usize];
    ["Offset of field: RowSet::index"][::core::mem::offset_of!(RowSet, index) - 0usize];
    ["Offset of field: RowSet::count"][::core::mem::offset_of!(RowSet, count) - 8usize];
    ["Offset of field: RowSet::bound"][::core::mem::offset_of!(RowSet, bound) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct KvLayer {
    pub data: *mut ::core::ffi::c_void,
    pub positions: *mut u32,
    pub tables: *const u32,
    pub lens: *mut u32,
    pub pages_per_seq: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub type_: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of KvLayer"][::core::mem::size_of::<KvLayer>() - 48usize];
    ["Alignment of KvLayer"][::core::mem::align_of::<KvLayer>() - 8usize];
    ["Offset of field: KvLayer::data"][::core::mem::offset_of!(KvLayer, data) - 0usize];
    ["Offset of field: KvLayer::positions"][::core::mem::offset_of!(KvLayer, positions) - 8usize];
    ["Offset of field: KvLayer::tables"][::core::mem::offset_of!(KvLayer, tables) - 16usize];
    ["Offset of field: KvLayer::lens"][::core::mem::offset_of!(KvLayer, lens) - 24usize];
    ["Offset of field: KvLayer::pages_per_seq"][::core::mem::offset_of!(KvLayer, pages_per_seq) - 32usize];
    ["Offset of field: KvLayer::kv_heads"][::core::mem::offset_of!(KvLayer, kv_heads) - 36usize];
    ["Offset of field: KvLayer::head_dim"][::core::mem::offset_of!(KvLayer, head_dim) - 40usize];
    ["Offset of field: KvLayer::type_"][::core::mem::offset_of!(KvLayer, type_) - 44usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct EmbedArgs {
    pub table: *const ::core::ffi::c_void,
    pub ids: *const u32,
    pub out: *mut f32,
    pub rows: u32,
    pub width: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of EmbedArgs"][::core::mem::size_of::<EmbedArgs>() - 32usize];
    ["Alignment of EmbedArgs"][::core::mem::align_of::<EmbedArgs>() - 8usize];
    ["Offset of field: EmbedArgs::table"][::core::mem::offset_of!(EmbedArgs, table) - 0usize];
    ["Offset of field: EmbedArgs::ids"][::core::mem::offset_of!(EmbedArgs, ids) - 8usize];
    ["Offset of field: EmbedArgs::out"][::core::mem::offset_of!(EmbedArgs, out) - 16usize];
    ["Offset of field: EmbedArgs::rows"][::core::mem::offset_of!(EmbedArgs, rows) - 24usize];
    ["Offset of field: EmbedArgs::width"][::core::mem::offset_of!(EmbedArgs, width) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RopeAnglesArgs {
    pub pos: *const u32,
    pub inv_freq: *const f32,
    pub out: *mut f32,
    pub rows: u32,
    pub half: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RopeAnglesArgs"][::core::mem::size_of::<RopeAnglesArgs>() - 32usize];
    ["Alignment of RopeAnglesArgs"][::core::mem::align_of::<RopeAnglesArgs>() - 8usize];
    ["Offset of field: RopeAnglesArgs::pos"][::core::mem::offset_of!(RopeAnglesArgs, pos) - 0usize];
    ["Offset of field: RopeAnglesArgs::inv_freq"][::core::mem::offset_of!(RopeAnglesArgs, inv_freq) - 8usize];
    ["Offset of field: RopeAnglesArgs::out"][::core::mem::offset_of!(RopeAnglesArgs, out) - 16usize];
    ["Offset of field: RopeAnglesArgs::rows"][::core::mem::offset_of!(RopeAnglesArgs, rows) - 24usize];
    ["Offset of field: RopeAnglesArgs::half"][::core::mem::offset_of!(RopeAnglesArgs, half) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct NormGateArgs {
    pub x: *const f32,
    pub rows: RowSet,
    pub weight: *const f32,
    pub eps: f32,
    pub width: u32,
    pub out: *mut ::core::ffi::c_void,
    pub router: *const f32,
    pub logits: *mut f32,
    pub work: *mut WorkCount,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of NormGateArgs"][::core::mem::size_of::<NormGateArgs>() - 80usize];
    ["Alignment of NormGateArgs"][::core::mem::align_of::<NormGateArgs>() - 8usize];
    ["Offset of field: NormGateArgs::x"][::core::mem::offset_of!(NormGateArgs, x) - 0usize];
    ["Offset of field: NormGateArgs::rows"][::core::mem::offset_of!(NormGateArgs, rows) - 8usize];
    ["Offset of field: NormGateArgs::weight"][::core::mem::offset_of!(NormGateArgs, weight) - 32usize];
    ["Offset of field: NormGateArgs::eps"][::core::mem::offset_of!(NormGateArgs, eps) - 40usize];
    ["Offset of field: NormGateArgs::width"][::core::mem::offset_of!(NormGateArgs, width) - 44usize];
    ["Offset of field: NormGateArgs::out"][::core::mem::offset_of!(NormGateArgs, out) - 48usize];
    ["Offset of field: NormGateArgs::router"][::core::mem::offset_of!(NormGateArgs, router) - 56usize];
    ["Offset of field: NormGateArgs::logits"][::core::mem::offset_of!(NormGateArgs, logits) - 64usize];
    ["Offset of field: NormGateArgs::work"][::core::mem::offset_of!(NormGateArgs, work) - 72usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GatherArgs {
    pub src: *const ::core::ffi::c_void,
    pub rows: RowSet,
    pub base: u32,
    pub width: u32,
    pub out: *mut ::core::ffi::c_void,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GatherArgs"][::core::mem::size_of::<GatherArgs>() - 48usize];
    ["Alignment of GatherArgs"][::core::mem::align_of::<GatherArgs>() - 8usize];
    ["Offset of field: GatherArgs::src"][::core::mem::offset_of!(GatherArgs, src) - 0usize];
    ["Offset of field: GatherArgs::rows"][::core::mem::offset_of!(GatherArgs, rows) - 8usize];
    ["Offset of field: GatherArgs::base"][::core::mem::offset_of!(GatherArgs, base) - 32usize];
    ["Offset of field: GatherArgs::width"][::core::mem::offset_of!(GatherArgs, width) - 36usize];
    ["Offset of field: GatherArgs::out"][::core::mem::offset_of!(GatherArgs, out) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct ScatterArgs {
    pub src: *const f32,
    pub bias: *const f32,
    pub rows: RowSet,
    pub width: u32,
    pub add: u32,
    pub x: *mut f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ScatterArgs"][::core::mem::size_of::<ScatterArgs>() - 56usize];
    ["Alignment of ScatterArgs"][::core::mem::align_of::<ScatterArgs>() - 8usize];
    ["Offset of field: ScatterArgs::src"][::core::mem::offset_of!(ScatterArgs, src) - 0usize];
    ["Offset of field: ScatterArgs::bias"][::core::mem::offset_of!(ScatterArgs, bias) - 8usize];
    ["Offset of field: ScatterArgs::rows"][::core::mem::offset_of!(ScatterArgs, rows) - 16usize];
    ["Offset of field: ScatterArgs::width"][::core::mem::offset_of!(ScatterArgs, width) - 40usize];
    ["Offset of field: ScatterArgs::add"][::core::mem::offset_of!(ScatterArgs, add) - 44usize];
    ["Offset of field: ScatterArgs::x"][::core::mem::offset_of!(ScatterArgs, x) - 48usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SiluMulArgs {
    pub gate: *const ::core::ffi::c_void,
    pub up: *const ::core::ffi::c_void,
    pub out: *mut ::core::ffi::c_void,
    pub rows: u32,
    pub width: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SiluMulArgs"][::core::mem::size_of::<SiluMulArgs>() - 32usize];
    ["Alignment of SiluMulArgs"][::core::mem::align_of::<SiluMulArgs>() - 8usize];
    ["Offset of field: SiluMulArgs::gate"][::core::mem::offset_of!(SiluMulArgs, gate) - 0usize];
    ["Offset of field: SiluMulArgs::up"][::core::mem::offset_of!(SiluMulArgs, up) - 8usize];
    ["Offset of field: SiluMulArgs::out"][::core::mem::offset_of!(SiluMulArgs, out) - 16usize];
    ["Offset of field: SiluMulArgs::rows"][::core::mem::offset_of!(SiluMulArgs, rows) - 24usize];
    ["Offset of field: SiluMulArgs::width"][::core::mem::offset_of!(SiluMulArgs, width) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct BiasArgs {
    pub out: *mut ::core::ffi::c_void,
    pub bias: *const f32,
    pub rows: u32,
    pub width: u32,
    pub add: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of BiasArgs"][::core::mem::size_of::<BiasArgs>() - 32usize];
    ["Alignment of BiasArgs"][::core::mem::align_of::<BiasArgs>() - 8usize];
    ["Offset of field: BiasArgs::out"][::core::mem::offset_of!(BiasArgs, out) - 0usize];
    ["Offset of field: BiasArgs::bias"][::core::mem::offset_of!(BiasArgs, bias) - 8usize];
    ["Offset of field: BiasArgs::rows"][::core::mem::offset_of!(BiasArgs, rows) - 16usize];
    ["Offset of field: BiasArgs::width"][::core::mem::offset_of!(BiasArgs, width) - 20usize];
    ["Offset of field: BiasArgs::add"][::core::mem::offset_of!(BiasArgs, add) - 24usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LogProbsArgs {
    pub logits: *const f32,
    pub targets: *const u32,
    pub out: *mut f32,
    pub rows: u32,
    pub vocab: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LogProbsArgs"][::core::mem::size_of::<LogProbsArgs>() - 32usize];
    ["Alignment of LogProbsArgs"][::core::mem::align_of::<LogProbsArgs>() - 8usize];
    ["Offset of field: LogProbsArgs::logits"][::core::mem::offset_of!(LogProbsArgs, logits) - 0usize];
    ["Offset of field: LogProbsArgs::targets"][::core::mem::offset_of!(LogProbsArgs, targets) - 8usize];
    ["Offset of field: LogProbsArgs::out"][::core::mem::offset_of!(LogProbsArgs, out) - 16usize];
    ["Offset of field: LogProbsArgs::rows"][::core::mem::offset_of!(LogProbsArgs, rows) - 24usize];
    ["Offset of field: LogProbsArgs::vocab"][::core::mem::offset_of!(LogProbsArgs, vocab) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SampleBounds {
    pub highest: f32,
    pub floor: f32,
    pub drawn: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleBounds"][::core::mem::size_of::<SampleBounds>() - 12usize];
    ["Alignment of SampleBounds"][::core::mem::align_of::<SampleBounds>() - 4usize];
    ["Offset of field: SampleBounds::highest"][::core::mem::offset_of!(SampleBounds, highest) - 0usize];
    ["Offset of field: SampleBounds::floor"][::core::mem::offset_of!(SampleBounds, floor) - 4usize];
    ["Offset of field: SampleBounds::drawn"][::core::mem::offset_of!(SampleBounds, drawn) - 8usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SampleArgs {
    pub logits: *const f32,
    pub draws: *const u32,
    pub best: *mut u64,
    pub bounds: *mut SampleBounds,
    pub keys: *mut u64,
    pub sums: *mut u64,
    pub counts: *mut u32,
    pub tokens: *mut u32,
    pub vocab: u32,
    pub groups: u32,
    pub chunks: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleArgs"][::core::mem::size_of::<SampleArgs>() - 80usize];
    ["Alignment of SampleArgs"][::core::mem::align_of::<SampleArgs>() - 8usize];
    ["Offset of field: SampleArgs::logits"][::core::mem::offset_of!(SampleArgs, logits) - 0usize];
    ["Offset of field: SampleArgs::draws"][::core::mem::offset_of!(SampleArgs, draws) - 8usize];
    ["Offset of field: SampleArgs::best"][::core::mem::offset_of!(SampleArgs, best) - 16usize];
    ["Offset of field: SampleArgs::bounds"][::core::mem::offset_of!(SampleArgs, bounds) - 24usize];
    ["Offset of field: SampleArgs::keys"][::core::mem::offset_of!(SampleArgs, keys) - 32usize];
    ["Offset of field: SampleArgs::sums"][::core::mem::offset_of!(SampleArgs, sums) - 40usize];
    ["Offset of field: SampleArgs::counts"][::core::mem::offset_of!(SampleArgs, counts) - 48usize];
    ["Offset of field: SampleArgs::tokens"][::core::mem::offset_of!(SampleArgs, tokens) - 56usize];
    ["Offset of field: SampleArgs::vocab"][::core::mem::offset_of!(SampleArgs, vocab) - 64usize];
    ["Offset of field: SampleArgs::groups"][::core::mem::offset_of!(SampleArgs, groups) - 68usize];
    ["Offset of field: SampleArgs::chunks"][::core::mem::offset_of!(SampleArgs, chunks) - 72usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct PutIntsArgs {
    pub runs: *const u32,
    pub starts: *const u32,
    pub ints: *mut u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PutIntsArgs"][::core::mem::size_of::<PutIntsArgs>() - 24usize];
    ["Alignment of PutIntsArgs"][::core::mem::align_of::<PutIntsArgs>() - 8usize];
    ["Offset of field: PutIntsArgs::runs"][::core::mem::offset_of!(PutIntsArgs, runs) - 0usize];
    ["Offset of field: PutIntsArgs::starts"][::core::mem::offset_of!(PutIntsArgs, starts) - 8usize];
    ["Offset of field: PutIntsArgs::ints"][::core::mem::offset_of!(PutIntsArgs, ints) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct NoiseArgs {
    pub out: *mut ::core::ffi::c_void,
    pub n: u64,
    pub seed: u64,
    pub mean: f32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of NoiseArgs"][::core::mem::size_of::<NoiseArgs>() - 32usize];
    ["Alignment of NoiseArgs"][::core::mem::align_of::<NoiseArgs>() - 8usize];
    ["Offset of field: NoiseArgs::out"][::core::mem::offset_of!(NoiseArgs, out) - 0usize];
    ["Offset of field: NoiseArgs::n"][::core::mem::offset_of!(NoiseArgs, n) - 8usize];
    ["Offset of field: NoiseArgs::seed"][::core::mem::offset_of!(NoiseArgs, seed) - 16usize];
    ["Offset of field: NoiseArgs::mean"][::core::mem::offset_of!(NoiseArgs, mean) - 24usize];
    ["Offset of field: NoiseArgs::scale"][::core::mem::offset_of!(NoiseArgs, scale) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RouteArgs {
    pub logits: *const f32,
    pub pos: *const u32,
    pub seq_start: *const u32,
    pub slots: *const u32,
    pub decided: *mut u32,
    pub cut_rows: *const u32,
    pub active: *mut u32,
    pub active_at: *mut u32,
    pub first: *mut u32,
    pub end: *mut u32,
    pub kv_row: *mut u32,
    pub scratch: *mut u32,
    pub kv: KvLayer,
    pub rows: u32,
    pub seqs: u32,
    pub cuts: u32,
    pub decide: u32,
    pub share: f32,
    pub window: u32,
    pub queries_active: u32,
    pub keys_active: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RouteArgs"][::core::mem::size_of::<RouteArgs>() - 176usize];
    ["Alignment of RouteArgs"][::core::mem::align_of::<RouteArgs>() - 8usize];
    ["Offset of field: RouteArgs::logits"][::core::mem::offset_of!(RouteArgs, logits) - 0usize];
    ["Offset of field: RouteArgs::pos"][::core::mem::offset_of!(RouteArgs, pos) - 8usize];
    ["Offset of field: RouteArgs::seq_start"][::core::mem::offset_of!(RouteArgs, seq_start) - 16usize];
    ["Offset of field: RouteArgs::slots"][::core::mem::offset_of!(RouteArgs, slots) - 24usize];
    ["Offset of field: RouteArgs::decided"][::core::mem::offset_of!(RouteArgs, decided) - 32usize];
    ["Offset of field: RouteArgs::cut_rows"][::core::mem::offset_of!(RouteArgs, cut_rows) - 40usize];
    ["Offset of field: RouteArgs::active"][::core::mem::offset_of!(RouteArgs, active) - 48usize];
    ["Offset of field: RouteArgs::active_at"][::core::mem::offset_of!(RouteArgs, active_at) - 56usize];
    ["Offset of field: RouteArgs::first"][::core::mem::offset_of!(RouteArgs, first) - 64usize];
    ["Offset of field: RouteArgs::end"][::core::mem::offset_of!(RouteArgs, end) - 72usize];
    ["Offset of field: RouteArgs::kv_row"][::core::mem::offset_of!(RouteArgs, kv_row) - 80usize];
    ["Offset of field: RouteArgs::scratch"][::core::mem::offset_of!(RouteArgs, scratch) - 88usize];
    ["Offset of field: RouteArgs::kv"][::core::mem::offset_of!(RouteArgs, kv) - 96usize];
    ["Offset of field: RouteArgs::rows"][::core::mem::offset_of!(RouteArgs, rows) - 144usize];
    ["Offset of field: RouteArgs::seqs"][::core::mem::offset_of!(RouteArgs, seqs) - 148usize];
    ["Offset of field: RouteArgs::cuts"][::core::mem::offset_of!(RouteArgs, cuts) - 152usize];
    ["Offset of field: RouteArgs::decide"][::core::mem::offset_of!(RouteArgs, decide) - 156usize];
    ["Offset of field: RouteArgs::share"][::core::mem::offset_of!(RouteArgs, share) - 160usize];
    ["Offset of field: RouteArgs::window"][::core::mem::offset_of!(RouteArgs, window) - 164usize];
    ["Offset of field: RouteArgs::queries_active"][::core::mem::offset_of!(RouteArgs, queries_active) - 168usize];
    ["Offset of field: RouteArgs::keys_active"][::core::mem::offset_of!(RouteArgs, keys_active) - 172usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RopeAppendArgs {
    pub angles: *const f32,
    pub pos: *const u32,
    pub row_slot: *const u32,
    pub q_rows: RowSet,
    pub kv_rows: RowSet,
    pub kv_row: *const u32,
    pub q: *mut ::core::ffi::c_void,
    pub k: *const ::core::ffi::c_void,
    pub v: *const ::core::ffi::c_void,
    pub q_norm: *const f32,
    pub k_norm: *const f32,
    pub eps: f32,
    pub heads: u32,
    pub kv: KvLayer,
    pub work: *mut WorkCount,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RopeAppendArgs"][::core::mem::size_of::<RopeAppendArgs>() - 184usize];
    ["Alignment of RopeAppendArgs"][::core::mem::align_of::<RopeAppendArgs>() - 8usize];
    ["Offset of field: RopeAppendArgs::angles"][::core::mem::offset_of!(RopeAppendArgs, angles) - 0usize];
    ["Offset of field: RopeAppendArgs::pos"][::core::mem::offset_of!(RopeAppendArgs, pos) - 8usize];
    ["Offset of field: RopeAppendArgs::row_slot"][::core::mem::offset_of!(RopeAppendArgs, row_slot) - 16usize];
    ["Offset of field: RopeAppendArgs::q_rows"][::core::mem::offset_of!(RopeAppendArgs, q_rows) - 24usize];
    ["Offset of field: RopeAppendArgs::kv_rows"][::core::mem::offset_of!(RopeAppendArgs, kv_rows) - 48usize];
    ["Offset of field: RopeAppendArgs::kv_row"][::core::mem::offset_of!(RopeAppendArgs, kv_row) - 72usize];
    ["Offset of field: RopeAppendArgs::q"][::core::mem::offset_of!(RopeAppendArgs, q) - 80usize];
    ["Offset of field: RopeAppendArgs::k"][::core::mem::offset_of!(RopeAppendArgs, k) - 88usize];
    ["Offset of field: RopeAppendArgs::v"][::core::mem::offset_of!(RopeAppendArgs, v) - 96usize];
    ["Offset of field: RopeAppendArgs::q_norm"][::core::mem::offset_of!(RopeAppendArgs, q_norm) - 104usize];
    ["Offset of field: RopeAppendArgs::k_norm"][::core::mem::offset_of!(RopeAppendArgs, k_norm) - 112usize];
    ["Offset of field: RopeAppendArgs::eps"][::core::mem::offset_of!(RopeAppendArgs, eps) - 120usize];
    ["Offset of field: RopeAppendArgs::heads"][::core::mem::offset_of!(RopeAppendArgs, heads) - 124usize];
    ["Offset of field: RopeAppendArgs::kv"][::core::mem::offset_of!(RopeAppendArgs, kv) - 128usize];
    ["Offset of field: RopeAppendArgs::work"][::core::mem::offset_of!(RopeAppendArgs, work) - 176usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttendArgs {
    pub q: *const ::core::ffi::c_void,
    pub out: *mut ::core::ffi::c_void,
    pub rows: RowSet,
    pub row_slot: *const u32,
    pub first: *const u32,
    pub end: *const u32,
    pub kv: KvLayer,
    pub heads: u32,
    pub type_: u32,
    pub scale: f32,
    pub blocks: u32,
    pub partial: *mut f32,
    pub tickets: *mut u32,
    pub work: *mut WorkCount,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttendArgs"][::core::mem::size_of::<AttendArgs>() - 152usize];
    ["Alignment of AttendArgs"][::core::mem::align_of::<AttendArgs>() - 8usize];
    ["Offset of field: AttendArgs::q"][::core::mem::offset_of!(AttendArgs, q) - 0usize];
    ["Offset of field: AttendArgs::out"][::core::mem::offset_of!(AttendArgs, out) - 8usize];
    ["Offset of field: AttendArgs::rows"][::core::mem::offset_of!(AttendArgs, rows) - 16usize];
    ["Offset of field: AttendArgs::row_slot"][::core::mem::offset_of!(AttendArgs, row_slot) - 40usize];
    ["Offset of field: AttendArgs::first"][::core::mem::offset_of!(AttendArgs, first) - 48usize];
    ["Offset of field: AttendArgs::end"][::core::mem::offset_of!(AttendArgs, end) - 56usize];
    ["Offset of field: AttendArgs::kv"][::core::mem::offset_of!(AttendArgs, kv) - 64usize];
    ["Offset of field: AttendArgs::heads"][::core::mem::offset_of!(AttendArgs, heads) - 112usize];
    ["Offset of field: AttendArgs::type_"][::core::mem::offset_of!(AttendArgs, type_) - 116usize];
    ["Offset of field: AttendArgs::scale"][::core::mem::offset_of!(AttendArgs, scale) - 120usize];
    ["Offset of field: AttendArgs::blocks"][::core::mem::offset_of!(AttendArgs, blocks) - 124usize];
    ["Offset of field: AttendArgs::partial"][::core::mem::offset_of!(AttendArgs, partial) - 128usize];
    ["Offset of field: AttendArgs::tickets"][::core::mem::offset_of!(AttendArgs, tickets) - 136usize];
    ["Offset of field: AttendArgs::work"][::core::mem::offset_of!(AttendArgs, work) - 144usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct TensorMap {
    pub words: [u64; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of TensorMap"][::core::mem::size_of::<TensorMap>() - 128usize];
    ["Alignment of TensorMap"][::core::mem::align_of::<TensorMap>() - 64usize];
    ["Offset of field: TensorMap::words"][::core::mem::offset_of!(TensorMap, words) - 0usize];
};
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone)]
pub struct AttendHopperArgs {
    pub pool: TensorMap,
    pub attend: AttendArgs,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttendHopperArgs"][::core::mem::size_of::<AttendHopperArgs>() - 320usize];
    ["Alignment of AttendHopperArgs"][::core::mem::align_of::<AttendHopperArgs>() - 64usize];
    ["Offset of field: AttendHopperArgs::pool"][::core::mem::offset_of!(AttendHopperArgs, pool) - 0usize];
    ["Offset of field: AttendHopperArgs::attend"][::core::mem::offset_of!(AttendHopperArgs, attend) - 128usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttendApartArgs {
    pub attend: AttendArgs,
    pub k: *const f32,
    pub v: *const f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttendApartArgs"][::core::mem::size_of::<AttendApartArgs>() - 168usize];
    ["Alignment of AttendApartArgs"][::core::mem::align_of::<AttendApartArgs>() - 8usize];
    ["Offset of field: AttendApartArgs::attend"][::core::mem::offset_of!(AttendApartArgs, attend) - 0usize];
    ["Offset of field: AttendApartArgs::k"][::core::mem::offset_of!(AttendApartArgs, k) - 152usize];
    ["Offset of field: AttendApartArgs::v"][::core::mem::offset_of!(AttendApartArgs, v) - 160usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct AttendBackwardArgs {
    pub attend: AttendArgs,
    pub d_out: *const f32,
    pub d_q: *mut f32,
    pub d_k: *mut f32,
    pub d_v: *mut f32,
    pub kv_start: *const u32,
    pub slots: u32,
    pub stats: *mut f32,
    pub bounds: *mut u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AttendBackwardArgs"][::core::mem::size_of::<AttendBackwardArgs>() - 216usize];
    ["Alignment of AttendBackwardArgs"][::core::mem::align_of::<AttendBackwardArgs>() - 8usize];
    ["Offset of field: AttendBackwardArgs::attend"][::core::mem::offset_of!(AttendBackwardArgs, attend) - 0usize];
    ["Offset of field: AttendBackwardArgs::d_out"][::core::mem::offset_of!(AttendBackwardArgs, d_out) - 152usize];
    ["Offset of field: AttendBackwardArgs::d_q"][::core::mem::offset_of!(AttendBackwardArgs, d_q) - 160usize];
    ["Offset of field: AttendBackwardArgs::d_k"][::core::mem::offset_of!(AttendBackwardArgs, d_k) - 168usize];
    ["Offset of field: AttendBackwardArgs::d_v"][::core::mem::offset_of!(AttendBackwardArgs, d_v) - 176usize];
    ["Offset of field: AttendBackwardArgs::kv_start"][::core::mem::offset_of!(AttendBackwardArgs, kv_start) - 184usize];
    ["Offset of field: AttendBackwardArgs::slots"][::core::mem::offset_of!(AttendBackwardArgs, slots) - 192usize];
    ["Offset of field: AttendBackwardArgs::stats"][::core::mem::offset_of!(AttendBackwardArgs, stats) - 200usize];
    ["Offset of field: AttendBackwardArgs::bounds"][::core::mem::offset_of!(AttendBackwardArgs, bounds) - 208usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct LossArgs {
    pub logits: *mut f32,
    pub targets: *const u32,
    pub other: *const f32,
    pub losses: *mut f32,
    pub scale: f32,
    pub vocab: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LossArgs"][::core::mem::size_of::<LossArgs>() - 40usize];
    ["Alignment of LossArgs"][::core::mem::align_of::<LossArgs>() - 8usize];
    ["Offset of field: LossArgs::logits"][::core::mem::offset_of!(LossArgs, logits) - 0usize];
    ["Offset of field: LossArgs::targets"][::core::mem::offset_of!(LossArgs, targets) - 8usize];
    ["Offset of field: LossArgs::other"][::core::mem::offset_of!(LossArgs, other) - 16usize];
    ["Offset of field: LossArgs::losses"][::core::mem::offset_of!(LossArgs, losses) - 24usize];
    ["Offset of field: LossArgs::scale"][::core::mem::offset_of!(LossArgs, scale) - 32usize];
    ["Offset of field: LossArgs::vocab"][::core::mem::offset_of!(LossArgs, vocab) - 36usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct NormBackwardArgs {
    pub x: *const f32,
    pub rows: *const u32,
    pub weight: *const f32,
    pub d_h: *const f32,
    pub router: *const f32,
    pub d_logits: *const f32,
    pub d_x: *mut f32,
    pub eps: f32,
    pub width: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of NormBackwardArgs"][::core::mem::size_of::<NormBackwardArgs>() - 64usize];
    ["Alignment of NormBackwardArgs"][::core::mem::align_of::<NormBackwardArgs>() - 8usize];
    ["Offset of field: NormBackwardArgs::x"][::core::mem::offset_of!(NormBackwardArgs, x) - 0usize];
    ["Offset of field: NormBackwardArgs::rows"][::core::mem::offset_of!(NormBackwardArgs, rows) - 8usize];
    ["Offset of field: NormBackwardArgs::weight"][::core::mem::offset_of!(NormBackwardArgs, weight) - 16usize];
    ["Offset of field: NormBackwardArgs::d_h"][::core::mem::offset_of!(NormBackwardArgs, d_h) - 24usize];
    ["Offset of field: NormBackwardArgs::router"][::core::mem::offset_of!(NormBackwardArgs, router) - 32usize];
    ["Offset of field: NormBackwardArgs::d_logits"][::core::mem::offset_of!(NormBackwardArgs, d_logits) - 40usize];
    ["Offset of field: NormBackwardArgs::d_x"][::core::mem::offset_of!(NormBackwardArgs, d_x) - 48usize];
    ["Offset of field: NormBackwardArgs::eps"][::core::mem::offset_of!(NormBackwardArgs, eps) - 56usize];
    ["Offset of field: NormBackwardArgs::width"][::core::mem::offset_of!(NormBackwardArgs, width) - 60usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RopeBackwardArgs {
    pub angles: *const f32,
    pub index: *const u32,
    pub d: *mut f32,
    pub norm: *const f32,
    pub src: *const f32,
    pub eps: f32,
    pub rows: u32,
    pub heads: u32,
    pub head_dim: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RopeBackwardArgs"][::core::mem::size_of::<RopeBackwardArgs>() - 56usize];
    ["Alignment of RopeBackwardArgs"][::core::mem::align_of::<RopeBackwardArgs>() - 8usize];
    ["Offset of field: RopeBackwardArgs::angles"][::core::mem::offset_of!(RopeBackwardArgs, angles) - 0usize];
    ["Offset of field: RopeBackwardArgs::index"][::core::mem::offset_of!(RopeBackwardArgs, index) - 8usize];
    ["Offset of field: RopeBackwardArgs::d"][::core::mem::offset_of!(RopeBackwardArgs, d) - 16usize];
    ["Offset of field: RopeBackwardArgs::norm"][::core::mem::offset_of!(RopeBackwardArgs, norm) - 24usize];
    ["Offset of field: RopeBackwardArgs::src"][::core::mem::offset_of!(RopeBackwardArgs, src) - 32usize];
    ["Offset of field: RopeBackwardArgs::eps"][::core::mem::offset_of!(RopeBackwardArgs, eps) - 40usize];
    ["Offset of field: RopeBackwardArgs::rows"][::core::mem::offset_of!(RopeBackwardArgs, rows) - 44usize];
    ["Offset of field: RopeBackwardArgs::heads"][::core::mem::offset_of!(RopeBackwardArgs, heads) - 48usize];
    ["Offset of field: RopeBackwardArgs::head_dim"][::core::mem::offset_of!(RopeBackwardArgs, head_dim) - 52usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SwiGluBackwardArgs {
    pub d_act: *const f32,
    pub gate: *mut f32,
    pub up: *mut f32,
    pub index: *const u32,
    pub dots: *mut f32,
    pub width: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SwiGluBackwardArgs"][::core::mem::size_of::<SwiGluBackwardArgs>() - 48usize];
    ["Alignment of SwiGluBackwardArgs"][::core::mem::align_of::<SwiGluBackwardArgs>() - 8usize];
    ["Offset of field: SwiGluBackwardArgs::d_act"][::core::mem::offset_of!(SwiGluBackwardArgs, d_act) - 0usize];
    ["Offset of field: SwiGluBackwardArgs::gate"][::core::mem::offset_of!(SwiGluBackwardArgs, gate) - 8usize];
    ["Offset of field: SwiGluBackwardArgs::up"][::core::mem::offset_of!(SwiGluBackwardArgs, up) - 16usize];
    ["Offset of field: SwiGluBackwardArgs::index"][::core::mem::offset_of!(SwiGluBackwardArgs, index) - 24usize];
    ["Offset of field: SwiGluBackwardArgs::dots"][::core::mem::offset_of!(SwiGluBackwardArgs, dots) - 32usize];
    ["Offset of field: SwiGluBackwardArgs::width"][::core::mem::offset_of!(SwiGluBackwardArgs, width) - 40usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct RowDotsArgs {
    pub a: *const f32,
    pub b: *const f32,
    pub index: *const u32,
    pub c: *const f32,
    pub bias: *const f32,
    pub out: *mut f32,
    pub width: u32,
    pub bias_width: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RowDotsArgs"][::core::mem::size_of::<RowDotsArgs>() - 56usize];
    ["Alignment of RowDotsArgs"][::core::mem::align_of::<RowDotsArgs>() - 8usize];
    ["Offset of field: RowDotsArgs::a"][::core::mem::offset_of!(RowDotsArgs, a) - 0usize];
    ["Offset of field: RowDotsArgs::b"][::core::mem::offset_of!(RowDotsArgs, b) - 8usize];
    ["Offset of field: RowDotsArgs::index"][::core::mem::offset_of!(RowDotsArgs, index) - 16usize];
    ["Offset of field: RowDotsArgs::c"][::core::mem::offset_of!(RowDotsArgs, c) - 24usize];
    ["Offset of field: RowDotsArgs::bias"][::core::mem::offset_of!(RowDotsArgs, bias) - 32usize];
    ["Offset of field: RowDotsArgs::out"][::core::mem::offset_of!(RowDotsArgs, out) - 40usize];
    ["Offset of field: RowDotsArgs::width"][::core::mem::offset_of!(RowDotsArgs, width) - 48usize];
    ["Offset of field: RowDotsArgs::bias_width"][::core::mem::offset_of!(RowDotsArgs, bias_width) - 52usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct GateBackwardArgs {
    pub sequences: *const u32,
    pub logits: *const f32,
    pub d_mask: *mut f32,
    pub h: *const f32,
    pub partial: *mut f32,
    pub d_router: *mut f32,
    pub penalty: f32,
    pub rows: u32,
    pub width: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GateBackwardArgs"][::core::mem::size_of::<GateBackwardArgs>() - 64usize];
    ["Alignment of GateBackwardArgs"][::core::mem::align_of::<GateBackwardArgs>() - 8usize];
    ["Offset of field: GateBackwardArgs::sequences"][::core::mem::offset_of!(GateBackwardArgs, sequences) - 0usize];
    ["Offset of field: GateBackwardArgs::logits"][::core::mem::offset_of!(GateBackwardArgs, logits) - 8usize];
    ["Offset of field: GateBackwardArgs::d_mask"][::core::mem::offset_of!(GateBackwardArgs, d_mask) - 16usize];
    ["Offset of field: GateBackwardArgs::h"][::core::mem::offset_of!(GateBackwardArgs, h) - 24usize];
    ["Offset of field: GateBackwardArgs::partial"][::core::mem::offset_of!(GateBackwardArgs, partial) - 32usize];
    ["Offset of field: GateBackwardArgs::d_router"][::core::mem::offset_of!(GateBackwardArgs, d_router) - 40usize];
    ["Offset of field: GateBackwardArgs::penalty"][::core::mem::offset_of!(GateBackwardArgs, penalty) - 48usize];
    ["Offset of field: GateBackwardArgs::rows"][::core::mem::offset_of!(GateBackwardArgs, rows) - 52usize];
    ["Offset of field: GateBackwardArgs::width"][::core::mem::offset_of!(GateBackwardArgs, width) - 56usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct Product {
    pub weight: *const ::core::ffi::c_void,
    pub bias: *const f32,
    pub out: *mut ::core::ffi::c_void,
    pub n: u32,
    pub set: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Product"][::core::mem::size_of::<Product>() - 32usize];
    ["Alignment of Product"][::core::mem::align_of::<Product>() - 8usize];
    ["Offset of field: Product::weight"][::core::mem::offset_of!(Product, weight) - 0usize];
    ["Offset of field: Product::bias"][::core::mem::offset_of!(Product, bias) - 8usize];
    ["Offset of field: Product::out"][::core::mem::offset_of!(Product, out) - 16usize];
    ["Offset of field: Product::n"][::core::mem::offset_of!(Product, n) - 24usize];
    ["Offset of field: Product::set"][::core::mem::offset_of!(Product, set) - 28usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone)]
pub struct SkinnyArgs {
    pub src: *const ::core::ffi::c_void,
    pub k: u32,
    pub base: u32,
    pub rows: [RowSet; 2usize],
    pub of: [Product; 3usize],
    pub best: *mut u64,
    pub work: *mut WorkCount,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SkinnyArgs"][::core::mem::size_of::<SkinnyArgs>() - 176usize];
    ["Alignment of SkinnyArgs"][::core::mem::align_of::<SkinnyArgs>() - 8usize];
    ["Offset of field: SkinnyArgs::src"][::core::mem::offset_of!(SkinnyArgs, src) - 0usize];
    ["Offset of field: SkinnyArgs::k"][::core::mem::offset_of!(SkinnyArgs, k) - 8usize];
    ["Offset of field: SkinnyArgs::base"][::core::mem::offset_of!(SkinnyArgs, base) - 12usize];
    ["Offset of field: SkinnyArgs::rows"][::core::mem::offset_of!(SkinnyArgs, rows) - 16usize];
    ["Offset of field: SkinnyArgs::of"][::core::mem::offset_of!(SkinnyArgs, of) - 64usize];
    ["Offset of field: SkinnyArgs::best"][::core::mem::offset_of!(SkinnyArgs, best) - 160usize];
    ["Offset of field: SkinnyArgs::work"][::core::mem::offset_of!(SkinnyArgs, work) - 168usize];
};
