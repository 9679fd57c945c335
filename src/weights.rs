//! `*.safetensors`: the tensors of a model, checked and read in place.
//!
//! Or, without a file, random ones of a given shape ([`Weights::random`]).
//!
//! The header of a safetensors file is eight bytes of length, then JSON: a table from names to dtype, shape and the range
//! of bytes behind the header. Everything in it is checked before a tensor is handed out: names are unique (within a file
//! and across shards), ranges are in the file, neither overlap nor leave gaps, and have the size of their shape. Nothing
//! is allocated that the file's own size does not bound.

use std::collections::btree_map::Entry as Slot;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use sha2::{Digest, Sha256};

use crate::backend::{Backend, Noise, Weight};
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::tensor::{Bytes, DType, Tensor};

mod random;

/// The tensors of one or more safetensors files, or random ones. Cloning shares them.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::bundle::Bundle;
/// use mindskip::tensor::DType;
/// use mindskip::weights::Weights;
///
/// let weights = Weights::open(Path::new("assets/stories"))?;
/// assert!(weights.contains("model.norm.weight") && !weights.contains("lm_head.weight"));
/// assert_eq!(weights.names().next(), Some("model.embed_tokens.weight"));
/// let norm = weights.tensor("model.norm.weight", 1, 128)?; // [1, hidden], in place
/// assert_eq!((norm.dtype, weights.main_dtype(), weights.files().len()), (DType::BF16, DType::BF16, 1));
/// assert_eq!((weights.bytes(), weights.dtypes()["BF16"]), (2 * weights.parameters(), weights.bytes()));
/// assert!(weights.find_non_finite().is_none() && weights.metadata().contains_key("format"));
///
/// let bytes = Bundle::embedded()?.file("model.safetensors")?.expect("it has one");
/// let same = Weights::from_parts(vec![("memory".into(), bytes)])?;
/// assert_eq!(same.fingerprint(), weights.fingerprint());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Weights {
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
struct Entry {
    /// Index into `files`.
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Stored(Bytes),
    /// Made when somebody asks for them, once.
    Random(Noise, Arc<OnceLock<Tensor>>),
}

impl Entry {
    fn dtype(&self) -> Result<DType> {
        match self.dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::F16 => Ok(DType::F16),
            Dtype::BF16 => Ok(DType::BF16),
            other => {
                Err(Error::new(Kind::Unsupported, format!("stored as {other}"))
                    .action("use weights in F32, F16 or BF16"))
            }
        }
    }

    fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor> {
        let dtype = self.dtype()?;
        match &self.data {
            Content::Stored(bytes) => Tensor::new(dtype, rows, cols, bytes.clone()),
            Content::Random(noise, made) => match made.get() {
                Some(tensor) => Ok(tensor.clone()),
                None => noise.tensor(dtype, rows, cols).map(|tensor| made.get_or_init(|| tensor).clone()),
            },
        }
    }

    /// Bytes of the data.
    fn len(&self) -> usize {
        match &self.data {
            Content::Stored(bytes) => bytes.len(),
            Content::Random(..) => self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8,
        }
    }
}

/// The bytes of a safetensors file with rows of f32, `[1, n]` each. The same contents give the same bytes: the
/// library's own writer has its metadata in the order of a HashMap, another one in every run.
pub(crate) fn to_safetensors<'a>(
    tensors: impl IntoIterator<Item = (String, &'a [f32])>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::json!(metadata));
    let mut data: Vec<u8> = Vec::new();
    for (name, values) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|w| w.to_le_bytes()));
        let info = TensorInfo { dtype: Dtype::F32, shape: vec![1, values.len()], data_offsets: (start, data.len()) };
        header.insert(name, serde_json::json!(info));
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' '); // the data stays aligned
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.append(&mut header);
    file.append(&mut data);
    file
}

impl Weights {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names, in `dir`.
    ///
    /// Errors: Io; Format when a file is damaged or the index does not fit the shards.
    pub fn open(dir: &Path) -> Result<Weights> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            return Self::from_parts(vec![(single.clone(), files::map(&single)?)]);
        }
        if index.exists() {
            return Self::open_sharded(dir, &index);
        }
        Err(Error::new(Kind::Io, "no model.safetensors and no model.safetensors.index.json")
            .at(dir)
            .action("give the folder of a model with safetensors weights; other formats need converting first"))
    }

    fn open_sharded(dir: &Path, path: &Path) -> Result<Weights> {
        let index = read_index(path)?;
        let names: BTreeSet<&String> = index.values().collect();
        let mut shards = Vec::with_capacity(names.len());
        for name in names {
            let shard = dir.join(name);
            if !shard.exists() {
                return Err(Error::new(Kind::Io, "missing, though the index names it")
                    .at(shard)
                    .action("download the missing shard"));
            }
            let bytes = files::map(&shard)?;
            shards.push((shard, bytes));
        }
        let weights = Self::from_parts(shards)?;
        for (tensor, file) in &index {
            let found = weights.tensors.get(tensor).is_some_and(|t| weights.files[t.file] == dir.join(file));
            if !found {
                return Err(damaged(format!("{tensor} is not in {file}, where the index looks for it")).at(path));
            }
        }
        Ok(weights)
    }

    /// Reads safetensors from memory; the paths are for messages only.
    ///
    /// Errors: Format.
    pub fn from_parts(parts: Vec<(PathBuf, Bytes)>) -> Result<Weights> {
        let mut weights = Weights { files: Vec::new(), tensors: BTreeMap::new(), metadata: BTreeMap::new() };
        for (file, (path, bytes)) in parts.into_iter().enumerate() {
            let (header, start) = Header::parse(&bytes).map_err(|e| e.at(&path))?;
            for (name, info) in header.tensors {
                let (from, to) = info.data_offsets;
                let data = Content::Stored(bytes.slice(start + from..start + to));
                match weights.tensors.entry(name) {
                    Slot::Vacant(slot) => slot.insert(Entry { file, dtype: info.dtype, shape: info.shape, data }),
                    Slot::Occupied(slot) => {
                        let other = weights.files[slot.get().file].display();
                        return Err(damaged(format!("{} is also in {other}", slot.key())).at(path));
                    }
                };
            }
            weights.metadata.extend(header.metadata);
            weights.files.push(path);
        }
        Ok(weights)
    }

    /// A tensor of the shape that the model needs; for a vector, `rows` is 1 and the file may say `[cols]`.
    ///
    /// Errors: Format when it is absent, Shape, Unsupported for dtypes other than f32, f16 and bf16.
    pub fn tensor(&self, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        let entry = self.entry(name, rows, cols)?;
        entry.tensor(rows, cols).map_err(|e| e.during(format!("reading {name}")).at(&self.files[entry.file]))
    }

    /// Hands a tensor to a backend; random ones are made there, where weights are not read in place.
    /// Errors: as [`Weights::tensor`] and the backend's.
    pub(crate) fn load(&self, name: &str, rows: usize, cols: usize, be: &mut dyn Backend) -> Result<Weight> {
        let entry = self.entry(name, rows, cols)?;
        match entry.data {
            Content::Random(noise, _) if be.info().weights.is_some() => be.random(entry.dtype()?, rows, cols, noise),
            _ => be.upload(&self.tensor(name, rows, cols)?),
        }
    }

    fn entry(&self, name: &str, rows: usize, cols: usize) -> Result<&Entry> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(Error::new(Kind::Format, format!("no tensor {name}"))
                .at(self.files.first().map_or(Path::new(""), PathBuf::as_path))
                .action("check that config.json and the weights are of the same model"));
        };
        let fail = |kind, cause: String| Error::new(kind, cause).at(&self.files[entry.file]);
        let fits = match entry.shape[..] {
            [n] => rows == 1 && n == cols,
            [r, c] => (r, c) == (rows, cols),
            _ => false,
        };
        if !fits {
            let wanted = if rows == 1 { format!("[{cols}]") } else { format!("[{rows}, {cols}]") };
            return Err(fail(
                Kind::Shape,
                format!("{name} has shape {:?}; config.json makes it {wanted}", entry.shape),
            )
            .action("check that config.json and the weights are of the same model"));
        }
        Ok(entry)
    }

    /// A tensor of shape `[n]` or `[1, n]`, whatever n is. Errors: as [`Weights::tensor`].
    pub(crate) fn vector(&self, name: &str) -> Result<Tensor> {
        let cols = self.tensors.get(name).and_then(|t| t.shape.last()).copied().unwrap_or(0);
        self.tensor(name, 1, cols)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// All names, in byte order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The files the tensors are in.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// What the headers say besides: the strings of `__metadata__`, of all files together.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(Entry::len).sum()
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(|t| t.shape.iter().product::<usize>()).sum()
    }

    /// Bytes of the tensors by dtype, as the headers name it: `{"BF16": 269030784, "F32": 2304}`.
    pub fn dtypes(&self) -> BTreeMap<String, usize> {
        let mut sums = BTreeMap::new();
        for tensor in self.tensors.values() {
            *sums.entry(tensor.dtype.to_string()).or_default() += tensor.len();
        }
        sums
    }

    /// The type that most of the model is stored in; f32 when that is none that is computed with.
    pub fn main_dtype(&self) -> DType {
        let dtypes = self.dtypes();
        let of = |dtype: &DType| dtypes.get(dtype.name()).copied().unwrap_or(0);
        [DType::F32, DType::F16, DType::BF16].into_iter().max_by_key(of).expect("three")
    }

    /// What a router file remembers of its base model: 32 hex digits that hardly cost reading, yet differ between a model
    /// and its fine-tune.
    ///
    /// The first half of a SHA-256 over, for every tensor by name in byte order: the name, the dtype as in the header,
    /// the shape joined by commas (each of the three ended by a newline), the first and then the last 4096 bytes of the
    /// data, or all of it twice when it is shorter. Of random tensors, the seed stands for the data.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (name, tensor) in &self.tensors {
            let shape: Vec<_> = tensor.shape.iter().map(usize::to_string).collect();
            hash.update(format!("{name}\n{}\n{}\n", tensor.dtype, shape.join(",")));
            match &tensor.data {
                Content::Stored(bytes) => {
                    let end = bytes.len().min(4096);
                    hash.update(&bytes[..end]);
                    hash.update(&bytes[bytes.len() - end..]);
                }
                Content::Random(noise, _) => hash.update(noise.seed.to_le_bytes()),
            }
        }
        hash.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The first tensor, by name, that holds a NaN or an infinity, and its file. Reads everything, on all cores: for
    /// explaining logits that are not numbers, not for every start.
    pub fn find_non_finite(&self) -> Option<(String, PathBuf)> {
        let tensors: Vec<_> = self.tensors.iter().collect();
        let broken = |t: &Entry| matches!(&t.data, Content::Stored(bytes) if !all_finite(t.dtype, bytes));
        let (name, tensor) = tensors.into_par_iter().find_first(|(_, t)| broken(t))?;
        Some((name.clone(), self.files[tensor.file].clone()))
    }
}

/// Whether no element has all exponent bits set. Integers and dtypes that do not run here pass.
fn all_finite(dtype: Dtype, data: &[u8]) -> bool {
    // Folding a block without early exit is what the compiler turns into vector code.
    let halves = |block: &[u8], mask: u16| {
        block.as_chunks().0.iter().fold(false, |bad, x| bad | (u16::from_le_bytes(*x) & mask == mask))
    };
    let words = |block: &[u8], mask: u32| {
        block.as_chunks().0.iter().fold(false, |bad, x| bad | (u32::from_le_bytes(*x) & mask == mask))
    };
    !data.par_chunks(1 << 16).any(|block| match dtype {
        Dtype::F16 => halves(block, 0x7c00),
        Dtype::BF16 => halves(block, 0x7f80),
        Dtype::F32 => words(block, 0x7f80_0000),
        _ => false,
    })
}

/// The header of a safetensors file.
#[derive(Default)]
struct Header {
    metadata: BTreeMap<String, String>,
    /// By position in the file.
    tensors: Vec<(String, TensorInfo)>,
}

impl Header {
    /// The header of a whole file, and where the data begins. The tensors' ranges are relative to that and in the file.
    ///
    /// safetensors' own reader keeps the last of two tensors with one name, and buffers what it reads many times over;
    /// this one uses its types and its check of the ranges.
    fn parse(file: &[u8]) -> Result<(Header, usize)> {
        let Some((length, rest)) = file.split_first_chunk() else {
            return Err(damaged(format!("{} bytes are no safetensors file", file.len())));
        };
        let length = u64::from_le_bytes(*length);
        let header = usize::try_from(length).ok().and_then(|n| rest.get(..n));
        let Some(header) = header else {
            return Err(damaged(format!("the header claims {length} bytes, of {} in the file", rest.len())));
        };
        let mut parsed: Header = serde_json::from_slice(header).map_err(|e| damaged(format!("broken header: {e}")))?;
        parsed.tensors.sort_by_key(|(_, info)| info.data_offsets);

        let table = Metadata::new(None, parsed.tensors.clone()).map_err(|e| damaged(format!("broken header: {e}")))?;
        let (claimed, found) = (table.data_len(), rest.len() - header.len());
        if claimed != found {
            let what = if claimed > found { "truncated" } else { "too long" };
            return Err(damaged(format!("{what}: {found} bytes of tensors, where the header has {claimed}")));
        }
        Ok((parsed, 8 + header.len()))
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Table;
        impl<'de> Visitor<'de> for Table {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a table of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header::default();
                let mut seen = BTreeSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("{name:?} occurs twice")));
                    }
                    match name.as_str() {
                        "__metadata__" => header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default(),
                        _ => header.tensors.push((name, map.next_value()?)),
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Table)
    }
}

/// `model.safetensors.index.json`: the shard of every tensor, a file in the folder of the index or below it.
///
/// Errors: Io; Format when it is damaged or names a file elsewhere.
pub(crate) fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(&files::read_small(path)?).map_err(|e| damaged(e).at(path))?;
    match index.weight_map.values().find(|name| !files::is_inside(name)) {
        None => Ok(index.weight_map),
        Some(name) => Err(Error::new(Kind::Format, format!("names {name:?}, which is not in its folder"))
            .at(path)
            .action("do not trust this model; its index reaches for other files")),
    }
}

fn damaged(cause: impl fmt::Display) -> Error {
    Error::new(Kind::Format, cause.to_string()).action("download the file again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A safetensors file with the header and data given as they are.
    fn file(header: &str, data: &[u8]) -> Bytes {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend(data);
        Bytes::new(bytes)
    }

    fn parse(bytes: Bytes) -> Result<Weights> {
        Weights::from_parts(vec![("a.safetensors".into(), bytes)])
    }

    #[test]
    fn broken_tables_are_refused_by_name() {
        let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        assert!(parse(file(one, &[0; 8])).is_ok());
        for (bytes, message) in [
            (Bytes::new(vec![1, 2, 3]), "3 bytes are no safetensors file"),
            (Bytes::new(u64::MAX.to_le_bytes().to_vec()), "header claims"),
            (Bytes::new([&100u64.to_le_bytes()[..], b"{}"].concat()), "header claims 100 bytes, of 2"),
            (file("{", &[]), "broken header"),
            (file(&"[".repeat(100_000), &[]), "broken header"),
            (file(one, &[0; 7]), "truncated: 7 bytes of tensors, where the header has 8"),
            (file(one, &[0; 9]), "too long"),
            (file(r#"{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]), "Q4"),
            (file(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, &[0; 8]), "broken header"),
            (file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, &[0; 8]), "`a`"),
            (file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#, &[0; 12]), "`a`"),
            (file(r#"{"a":{"dtype":"F32","shape":[4611686018427387905],"data_offsets":[0,4]}}"#, &[0; 4]), "overflow"),
            (
                file(
                    r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                    &[0; 12],
                ),
                "`b`",
            ),
            (
                file(
                    r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}"#,
                    &[0; 8],
                ),
                "\"a\" occurs twice",
            ),
        ] {
            let error = parse(bytes).unwrap_err();
            let text = error.to_string();
            assert_eq!(error.kind(), Kind::Format, "{text}");
            assert!(text.starts_with("a.safetensors: ") && text.contains(message), "{text}");
            assert!(text.ends_with("; download the file again"), "{text}");
        }
    }

    #[test]
    fn tensors_are_checked_when_they_are_asked_for() {
        let header = r#"{"m":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]},"i":{"dtype":"I8","shape":[4],"data_offsets":[12,16]}}"#;
        let weights = parse(file(header, &[0; 16])).unwrap();
        assert_eq!(weights.tensor("m", 2, 3).unwrap().to_f32(), [0.0; 6]);
        assert_eq!((weights.bytes(), weights.names().collect::<Vec<_>>()), (16, vec!["i", "m"]));
        for (name, rows, cols, kind, message) in [
            ("x", 1, 1, Kind::Format, "a.safetensors: no tensor x; check"),
            ("m", 3, 2, Kind::Shape, "a.safetensors: m has shape [2, 3]; config.json makes it [3, 2]; check"),
            ("m", 1, 6, Kind::Shape, "makes it [6]"),
            ("i", 1, 4, Kind::Unsupported, "a.safetensors: stored as I8 (while reading i); use weights in"),
        ] {
            let error = weights.tensor(name, rows, cols).unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn shards_are_joined_and_checked_against_their_index() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, tensor: &str| {
            let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
            fs::write(dir.path().join(name), &file(&header, &[0; 4])[..]).unwrap();
        };
        let index = |map: &str| {
            fs::write(dir.path().join("model.safetensors.index.json"), format!(r#"{{"weight_map":{map}}}"#)).unwrap();
            Weights::open(dir.path())
        };
        write("1.safetensors", "a");
        write("2.safetensors", "b");
        let weights = index(r#"{"a":"1.safetensors","b":"2.safetensors"}"#).unwrap();
        assert_eq!((weights.files().len(), weights.contains("b")), (2, true));

        for (map, message) in [
            (r#"{"a":"3.safetensors"}"#, "download the missing shard"),
            (r#"{"a":"2.safetensors"}"#, "a is not in 2.safetensors, where the index looks for it"),
            (r#"{"a":"../1.safetensors"}"#, "not in its folder"),
            (r#"{"a":"/etc/passwd"}"#, "not in its folder"),
            (r#"{"a":""}"#, "not in its folder"),
            ("[]", "download the file again"),
        ] {
            let error = index(map).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        write("2.safetensors", "a");
        let error = index(r#"{"a":"1.safetensors","b":"2.safetensors"}"#).unwrap_err().to_string();
        assert!(error.contains("2.safetensors: a is also in ") && error.contains("1.safetensors"), "{error}");
    }

    #[test]
    fn numbers_that_are_none_are_found() {
        for (dtype, size, bad) in [
            ("F32", 4, f32::NEG_INFINITY.to_le_bytes().to_vec()),
            ("F16", 2, half::f16::NAN.to_le_bytes().to_vec()),
            ("BF16", 2, half::bf16::INFINITY.to_le_bytes().to_vec()),
        ] {
            let n = 100_000;
            let header = format!(
                r#"{{"a":{{"dtype":"{dtype}","shape":[0],"data_offsets":[0,0]}},"b":{{"dtype":"{dtype}","shape":[{n}],"data_offsets":[0,{}]}}}}"#,
                n * size
            );
            let mut data = vec![0x3c; n * size];
            assert_eq!(parse(file(&header, &data)).unwrap().find_non_finite(), None);
            let last = data.len() - size;
            data[last..].copy_from_slice(&bad);
            let found = parse(file(&header, &data)).unwrap().find_non_finite();
            assert_eq!(found, Some(("b".into(), "a.safetensors".into())));
        }
    }

    #[test]
    fn the_fingerprint_is_as_written_down() {
        let header = r#"{"b":{"dtype":"I8","shape":[5000],"data_offsets":[0,5000]},"a":{"dtype":"F32","shape":[1,1],"data_offsets":[5000,5004]}}"#;
        let data: Vec<u8> = (0..5004u32).map(|i| (i % 251) as u8).collect();
        let mut hash = Sha256::new();
        hash.update("a\nF32\n1,1\n");
        hash.update(&data[5000..]);
        hash.update(&data[5000..]);
        hash.update("b\nI8\n5000\n");
        hash.update(&data[..4096]);
        hash.update(&data[5000 - 4096..5000]);
        let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(parse(file(header, &data)).unwrap().fingerprint(), digest[..32]);
    }
}
