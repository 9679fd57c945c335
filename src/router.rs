//! The vocabulary of routing, and router files.
//!
//! A router file is a safetensors file with one vector per routed layer, `model.layers.{l}.router.weight`, and its settings
//! as metadata. What the published Router-Tuning code saves loads too: there the settings are keys of the `config.json`
//! beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;

use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::tensor::Bytes;
use crate::weights::{Weights, to_safetensors};

/// An enum whose variants have names, listed once.
macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }

        impl $name {
            /// Every value; each is parsed from its name.
            ///
            /// ```
            #[doc = concat!("use ", module_path!(), "::", stringify!($name), ";")]
            ///
            #[doc = concat!("for value in ", stringify!($name), "::ALL {")]
            ///     assert_eq!(value.name().parse(), Ok(*value));
            /// }
            #[doc = concat!("assert!(\"\".parse::<", stringify!($name), ">().is_err());")]
            /// ```
            pub const ALL: &'static [$name] = &[$($name::$variant),+];

            /// As it is written in files and on the command line.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                Self::ALL.iter().copied().find(|v| v.name() == text).ok_or_else(|| no_choice(text, &[$($text),+]))
            }
        }
    };
}

pub(crate) use named;

pub(crate) fn no_choice(text: &str, choices: &[&str]) -> Error {
    Error::new(Kind::Argument, format!("{text:?} is not one of {}", choices.join(", ")))
}

named! {
    /// What a skip leaves out.
    Target {
        /// The attention sub-layer: x += m·Attn(h).
        Attn = "attn",
        /// The MLP sub-layer: x += m·MLP(norm(x)).
        Mlp = "mlp",
        /// Both: x += m·(Block(x) − x).
        Block = "block",
    }
}

named! {
    /// What decides together.
    Level {
        /// Every token for itself.
        Token = "token",
        /// The whole sequence, once, by the mean over its prompt.
        Sequence = "sequence",
    }
}

named! {
    /// Whose keys and values a routed layer holds, at token level.
    Keys {
        /// Everyone's: only queries and outputs are skipped.
        All = "all",
        /// The active tokens': a skipped one is invisible in this layer.
        Active = "active",
    }
}

named! {
    /// How scores become a mask.
    Select {
        /// Active when the score reaches the threshold (Router-Tuning).
        Threshold = "threshold",
        /// The ceil(capacity·T) best of a sequence in prefill and training, the threshold in decode (Mixture-of-Depths).
        TopK = "topk",
    }
}

/// Target and level, written `attn_token`.
///
/// ```
/// use mindskip::router::{Granularity, Level, Target};
///
/// let granularity = Granularity { target: Target::Block, level: Level::Sequence };
/// assert_eq!("block_sequence".parse(), Ok(granularity));
/// assert_eq!(Granularity::NAMES[5], granularity.to_string());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Granularity {
    /// What a skip leaves out.
    pub target: Target,
    /// What decides together.
    pub level: Level,
}

impl Granularity {
    /// Every granularity.
    pub const NAMES: [&str; 6] =
        ["attn_token", "attn_sequence", "mlp_token", "mlp_sequence", "block_token", "block_sequence"];
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}_{}", self.target, self.level))
    }
}

impl FromStr for Granularity {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let parts = text.split_once('_').and_then(|(target, level)| Some((target.parse().ok()?, level.parse().ok()?)));
        let (target, level) = parts.ok_or_else(|| no_choice(text, &Self::NAMES))?;
        Ok(Granularity { target, level })
    }
}

/// How the scores of the routers are used.
///
/// ```
/// use mindskip::router::{Keys, RouterSettings, Select};
///
/// let paper = RouterSettings::default(); // attn_token, keys all, threshold 0.5
/// assert!(paper.keeps_kv() && !RouterSettings { keys: Keys::Active, ..paper }.keeps_kv());
/// let mixture = RouterSettings { select: Select::TopK, capacity: 0.125, ..paper };
/// assert!(mixture.check().is_ok() && RouterSettings { capacity: 0.0, ..mixture }.check().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterSettings {
    /// What is skipped, and what decides together.
    pub granularity: Granularity,
    /// Whose keys and values are kept; no meaning at sequence level.
    pub keys: Keys,
    /// How scores become a mask.
    pub select: Select,
    /// Active from this score on, a probability.
    pub threshold: f32,
    /// Share of a sequence's tokens that [`Select::TopK`] takes, in (0, 1]; no meaning otherwise.
    pub capacity: f32,
}

impl Default for RouterSettings {
    fn default() -> Self {
        RouterSettings {
            granularity: Granularity { target: Target::Attn, level: Level::Token },
            keys: Keys::All,
            select: Select::Threshold,
            threshold: 0.5,
            capacity: 0.5,
        }
    }
}

impl RouterSettings {
    /// Whether skipped rows write K/V all the same: where attention is not what is skipped, and at token level with
    /// [`Keys::All`].
    pub fn keeps_kv(&self) -> bool {
        let Granularity { target, level } = self.granularity;
        target == Target::Mlp || level == Level::Token && self.keys == Keys::All
    }

    /// Errors: Argument when a number is out of range.
    pub fn check(&self) -> Result<()> {
        let checked = |name: &str, value: f32, fits: bool, range: &str| {
            if fits {
                return Ok(());
            }
            Err(Error::new(Kind::Argument, format!("{name} is {value}")).action(format!("give a number in {range}")))
        };
        // 1 is allowed, and out of reach for a sigmoid but by rounding: everything is skipped.
        checked("threshold", self.threshold, (0.0..=1.0).contains(&self.threshold), "[0, 1]")?;
        checked("capacity", self.capacity, self.capacity > 0.0 && self.capacity <= 1.0, "(0, 1]")
    }
}

/// What a user asks to be different from what a router file says.
///
/// ```
/// use mindskip::router::{Overrides, RouterSettings};
///
/// let stricter = Overrides { threshold: Some(0.7), ..Overrides::default() };
/// let settings = stricter.apply(RouterSettings::default())?;
/// assert_eq!(settings, RouterSettings { threshold: 0.7, ..RouterSettings::default() });
/// assert!(Overrides { threshold: Some(1.1), ..stricter }.apply(settings).is_err());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[allow(missing_docs)] // the fields of RouterSettings
pub struct Overrides {
    pub granularity: Option<Granularity>,
    pub keys: Option<Keys>,
    pub select: Option<Select>,
    pub threshold: Option<f32>,
    pub capacity: Option<f32>,
}

impl Overrides {
    /// The settings with what was asked for. Errors: Argument when a number is out of range.
    pub fn apply(&self, settings: RouterSettings) -> Result<RouterSettings> {
        let settings = RouterSettings {
            granularity: self.granularity.unwrap_or(settings.granularity),
            keys: self.keys.unwrap_or(settings.keys),
            select: self.select.unwrap_or(settings.select),
            threshold: self.threshold.unwrap_or(settings.threshold),
            capacity: self.capacity.unwrap_or(settings.capacity),
        };
        settings.check()?;
        Ok(settings)
    }
}

/// Trained routers and how to use them.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::bundle::Bundle;
/// use mindskip::router::{Keys, Overrides, RouterSet};
///
/// let mut routers = RouterSet::open(Path::new("assets/stories/routers.safetensors"))?;
/// let bundle = Bundle::embedded()?;
/// routers.check(&bundle.config, &bundle.weights.fingerprint())?;
/// routers.apply(&Overrides { keys: Some(Keys::Active), threshold: Some(0.4), ..Overrides::default() })?;
/// routers.keep(&[3, 5])?;
/// routers.thresholds.insert(5, 0.7);
/// assert_eq!((routers.threshold(3), routers.threshold(5)), (0.4, 0.7));
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("two.safetensors");
/// routers.save(&path)?;
/// let (saved, bytes) = (RouterSet::open(&path)?, routers.to_bytes());
/// assert_eq!((saved.settings.keys, saved.threshold(5), &saved.weights), (Keys::Active, 0.7, &routers.weights));
/// assert_eq!(RouterSet::from_bytes(&path, mindskip::tensor::Bytes::new(bytes))?, saved);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSet {
    /// How the scores are used.
    pub settings: RouterSettings,
    /// By layer: the router, `[hidden]`.
    pub weights: BTreeMap<usize, Vec<f32>>,
    /// By layer: from which score on a row is active, where that is not the threshold of the settings.
    pub thresholds: BTreeMap<usize, f32>,
    /// [`Weights::fingerprint`] of the base model, when the file knows it.
    pub fingerprint: Option<String>,
    /// Whatever else the metadata says; kept when the set is saved.
    pub metadata: BTreeMap<String, String>,
    /// Where it was read from; for messages.
    pub path: PathBuf,
}

const FORMAT: &str = "mindskip-routers-1";
/// What of the metadata stands for fields.
const KEYS: [&str; 9] =
    ["format", "granularity", "keys", "select", "threshold", "capacity", "layers", "thresholds", "fingerprint"];

impl RouterSet {
    /// Reads a router file, or a folder as the published code saves it: `config.json` with the settings and safetensors
    /// with the routers, alone or among all other weights.
    ///
    /// Errors: Io; Format; Unsupported for a newer format.
    pub fn open(path: &Path) -> Result<RouterSet> {
        let (weights, config) = if path.is_dir() {
            (Weights::open(path)?, path.join("config.json"))
        } else {
            (Weights::from_parts(vec![(path.into(), files::map(path)?)])?, path.with_file_name("config.json"))
        };
        let mut set = Self::of(&weights, path)?;
        if !set.is_ours()
            && let Some(bytes) = files::read_if_exists(&config)?
        {
            set.apply_published(&bytes).map_err(|e| e.at(config))?;
        }
        Ok(set)
    }

    /// Reads the bytes of a router file; the path is for messages. Without settings in its metadata, the layers that it
    /// has routers for are routed with the default settings.
    ///
    /// Errors: Format; Unsupported for a newer format.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<RouterSet> {
        Self::of(&Weights::from_parts(vec![(path.into(), bytes)])?, path)
    }

    fn of(weights: &Weights, path: &Path) -> Result<RouterSet> {
        let mut routers = BTreeMap::new();
        for name in weights.names() {
            if let Some(layer) = layer_of(name) {
                routers.insert(layer, weights.vector(name)?.to_f32());
            }
        }
        if routers.is_empty() {
            return Err(Error::new(Kind::Format, "no routers (model.layers.{l}.router.weight)")
                .at(path)
                .action("give a router file, as Router-Tuning makes it"));
        }
        let mut set = RouterSet {
            settings: RouterSettings::default(),
            weights: routers,
            thresholds: BTreeMap::new(),
            fingerprint: None,
            metadata: weights.metadata().clone(),
            path: path.into(),
        };
        set.apply_metadata().map_err(|e| e.at(path))?;
        Ok(set)
    }

    fn is_ours(&self) -> bool {
        self.metadata.get("format").is_some_and(|f| f == FORMAT)
    }

    /// Moves what the metadata says of the settings into the fields that stand for it.
    fn apply_metadata(&mut self) -> Result<()> {
        match self.metadata.get("format").map(String::as_str) {
            Some(FORMAT) => {}
            Some(other) if other.starts_with("mindskip-routers-") => {
                return Err(Error::new(Kind::Unsupported, format!("the format {other:?} is unknown here"))
                    .action("update mindskip"));
            }
            _ => return Ok(()), // PyTorch writes "pt"
        }
        let all = &mut self.metadata;
        let settings = &mut self.settings;
        settings.granularity = take(all, "granularity")?.unwrap_or(settings.granularity);
        settings.keys = take(all, "keys")?.unwrap_or(settings.keys);
        settings.select = take(all, "select")?.unwrap_or(settings.select);
        settings.threshold = take(all, "threshold")?.unwrap_or(settings.threshold);
        settings.capacity = take(all, "capacity")?.unwrap_or(settings.capacity);
        settings.check().map_err(|e| broken(e.to_string()))?;
        self.fingerprint = take(all, "fingerprint")?;
        let listed: Option<String> = take(all, "layers")?;
        let thresholds: Option<String> = take(all, "thresholds")?;
        let found = self.layer_list();
        if let Some(listed) = listed.filter(|listed| listed.replace(' ', "") != found) {
            return Err(broken(format!("lists the layers {listed}, but has routers for {found}")));
        }
        let Some(listed) = thresholds else { return Ok(()) };
        let values: Vec<f32> = listed.split(',').filter_map(|value| value.trim().parse().ok()).collect();
        if values.len() != self.weights.len() || !values.iter().all(|t| (0.0..=1.0).contains(t)) {
            let cause = format!("has the thresholds {listed:?}: not one within [0, 1] for each of the layers {found}");
            return Err(broken(cause));
        }
        self.thresholds = self.weights.keys().copied().zip(values).collect();
        Ok(())
    }

    /// From which score on a row is active in a layer.
    pub fn threshold(&self, layer: usize) -> f32 {
        self.thresholds.get(&layer).copied().unwrap_or(self.settings.threshold)
    }

    /// Puts other settings in place of the file's. Errors: as of [`Overrides::apply`].
    pub fn apply(&mut self, overrides: &Overrides) -> Result<()> {
        self.settings = overrides.apply(self.settings)?;
        if overrides.threshold.is_some() {
            self.thresholds.clear();
        }
        Ok(())
    }

    /// Gives up the routers of all other layers. Errors: Argument for a layer without a router.
    pub fn keep(&mut self, layers: &[usize]) -> Result<()> {
        if let Some(layer) = layers.iter().find(|l| !self.weights.contains_key(l)) {
            let there: Vec<_> = self.weights.keys().map(usize::to_string).collect();
            return Err(Error::new(Kind::Argument, format!("there is no router for layer {layer}"))
                .action(format!("choose from {}", there.join(","))));
        }
        self.weights.retain(|layer, _| layers.contains(layer));
        self.thresholds.retain(|layer, _| layers.contains(layer));
        Ok(())
    }

    /// Takes the settings from a `config.json` by the published code. There every token writes keys and values, and
    /// scores meet a threshold. The granularity is searched for words and is `attn_sequence` by default; the list of layers
    /// says which were routed: a router elsewhere was never used.
    fn apply_published(&mut self, config: &[u8]) -> Result<()> {
        let published: Published =
            serde_json::from_slice(config).map_err(|e| broken(format!("broken settings: {e}")))?;
        let routed = published.is_mod.or(published.is_mindskip);
        if routed.is_some() || published.granularity.is_some() {
            let words = published.granularity.as_deref().unwrap_or("attn_sequence").to_lowercase();
            let target = match () {
                () if words.contains("block") => Target::Block,
                () if words.contains("mlp") => Target::Mlp,
                () => Target::Attn,
            };
            let level = if words.contains("token") { Level::Token } else { Level::Sequence };
            self.settings.granularity = Granularity { target, level };
        }
        self.settings.threshold = published.threshold.unwrap_or(self.settings.threshold);
        // A goal of its training, used here only when a user asks for `topk`. It may be null or a list.
        if let Some(capacity) = published.mod_capacity.as_ref().and_then(serde_json::Value::as_f64) {
            self.settings.capacity = capacity as f32;
        }
        self.settings.check().map_err(|e| broken(e.to_string()))?;
        if let Some(routed) = routed {
            if let Some(layer) = (0..routed.len()).find(|l| routed[*l] && !self.weights.contains_key(l)) {
                return Err(broken(format!("routes layer {layer}, but there is no router for it")));
            }
            self.weights.retain(|&layer, _| routed.get(layer).is_some_and(|&r| r));
        }
        Ok(())
    }

    /// Whether the routers fit the model.
    ///
    /// Errors: Mismatch: other layers, other width, another fingerprint. Numeric: a NaN or an infinity.
    pub fn check(&self, config: &Config, base_fingerprint: &str) -> Result<()> {
        let fail = |kind, cause: String, action: &str| Err(Error::new(kind, cause).at(&self.path).action(action));
        let other = "use the routers with the model they were tuned for, or tune new ones";
        for (&layer, router) in &self.weights {
            if layer >= config.layers {
                let cause = format!("routes layer {layer}; the model has the layers 0 to {}", config.layers - 1);
                return fail(Kind::Mismatch, cause, other);
            }
            if router.len() != config.hidden {
                let cause =
                    format!("the router of layer {layer} has width {}, the model {}", router.len(), config.hidden);
                return fail(Kind::Mismatch, cause, other);
            }
            if let Some(i) = router.iter().position(|w| !w.is_finite()) {
                let cause = format!("{} is {} at {i}", tensor_name(layer), router[i]);
                return fail(
                    Kind::Numeric,
                    cause,
                    "the tuning run diverged: use an earlier checkpoint or a lower learning rate",
                );
            }
        }
        match &self.fingerprint {
            Some(own) if own != base_fingerprint => {
                fail(Kind::Mismatch, format!("made for the model {own}, used with {base_fingerprint}"), other)
            }
            _ => Ok(()),
        }
    }

    /// Writes the set, f32, all or nothing. The same set gives the same bytes.
    ///
    /// Errors: Io.
    pub fn save(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes();
        files::write_atomically(path, |file| file.write_all(&bytes))
    }

    /// The bytes of a router file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut metadata = self.metadata.clone();
        // A foreign file may have used our names for something else.
        metadata.retain(|key, _| !KEYS.contains(&key.as_str()));
        let mut set = |key: &str, value: String| metadata.insert(key.into(), value);
        set("format", FORMAT.into());
        set("granularity", self.settings.granularity.to_string());
        set("keys", self.settings.keys.to_string());
        set("select", self.settings.select.to_string());
        set("threshold", self.settings.threshold.to_string());
        if self.settings.select == Select::TopK {
            set("capacity", self.settings.capacity.to_string());
        }
        set("layers", self.layer_list());
        if !self.thresholds.is_empty() {
            let each: Vec<String> = self.weights.keys().map(|&layer| self.threshold(layer).to_string()).collect();
            set("thresholds", each.join(","));
        }
        if let Some(fingerprint) = &self.fingerprint {
            set("fingerprint", fingerprint.clone());
        }

        let tensors = self.weights.iter().map(|(&layer, router)| (tensor_name(layer), &router[..]));
        to_safetensors(tensors, &metadata)
    }

    fn layer_list(&self) -> String {
        self.weights.keys().map(usize::to_string).collect::<Vec<_>>().join(",")
    }
}

fn tensor_name(layer: usize) -> String {
    format!("model.layers.{layer}.router.weight")
}

fn layer_of(name: &str) -> Option<usize> {
    let layer: usize = name.strip_prefix("model.layers.")?.strip_suffix(".router.weight")?.parse().ok()?;
    (tensor_name(layer) == name).then_some(layer)
}

fn broken(cause: String) -> Error {
    Error::new(Kind::Format, cause).action("save the routers again")
}

fn take<T: FromStr<Err: fmt::Display>>(metadata: &mut BTreeMap<String, String>, key: &str) -> Result<Option<T>> {
    let Some(text) = metadata.remove(key) else { return Ok(None) };
    text.parse().map(Some).map_err(|e| broken(format!("{key} is {text:?}: {e}")))
}

/// The keys that the published code adds to `config.json`. Its first release said `is_mindskip` for `is_mod`.
#[derive(Deserialize)]
struct Published {
    is_mod: Option<Vec<bool>>,
    is_mindskip: Option<Vec<bool>>,
    granularity: Option<String>,
    threshold: Option<f32>,
    mod_capacity: Option<serde_json::Value>,
}

/// Which layers are routed, as a user writes it: `last:N`, `auto:N`, `all`, `3-9`, `1,2,5`.
///
/// ```
/// use mindskip::router::LayerSpec;
///
/// assert_eq!("last:3".parse::<LayerSpec>()?.resolve(8)?, [4, 5, 6]);
/// assert_eq!("1,5-7".parse(), Ok(LayerSpec::List(vec![1, 5, 6, 7])));
/// assert!("3-9".parse::<LayerSpec>()?.resolve(8).is_err(), "there is no layer 8");
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerSpec {
    /// The N layers before the final one, which is never routed; as in the paper.
    Last(usize),
    /// The N layers that are missed the least; see [`LayerCosts`](crate::tune::layers::LayerCosts).
    Auto(usize),
    /// Every layer.
    All,
    /// These, in ascending order.
    List(Vec<usize>),
}

impl LayerSpec {
    /// The layers in a model of `layers` layers, ascending. Errors: Argument when one does not exist, and for `auto:N`,
    /// which a model's own losses decide.
    pub fn resolve(&self, layers: usize) -> Result<Vec<usize>> {
        let fail = |cause: String| Err(Error::new(Kind::Argument, cause).action("name layers that the model has"));
        match self {
            LayerSpec::Last(n) if *n >= layers => {
                fail(format!("last:{n} of a model with {layers} layers, of which the final one is not routed"))
            }
            LayerSpec::Last(n) => Ok((layers - 1 - n..layers - 1).collect()),
            LayerSpec::Auto(n) if *n > layers => fail(format!("auto:{n} of a model with {layers} layers")),
            LayerSpec::Auto(n) => Err(Error::new(Kind::Argument, format!("auto:{n} is for tune, which measures it"))
                .action("write last:N or a list of layers")),
            LayerSpec::All => Ok((0..layers).collect()),
            LayerSpec::List(list) => match list.iter().find(|&&l| l >= layers) {
                Some(layer) => {
                    fail(format!("layer {layer} of a model with the layers 0 to {}", layers.saturating_sub(1)))
                }
                None => Ok(list.clone()),
            },
        }
    }
}

impl FromStr for LayerSpec {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let fail = || {
            Error::new(Kind::Argument, format!("{text:?} names no layers")).action(
                "write last:N (the N before the final layer), auto:N, all, a range such as 3-9, or a list such as 1,2,5",
            )
        };
        let number = |s: &str| s.trim().parse::<u16>().map(usize::from).map_err(|_| fail());
        if text == "all" {
            return Ok(LayerSpec::All);
        }
        for (prefix, spec) in [("last:", LayerSpec::Last as fn(usize) -> _), ("auto:", LayerSpec::Auto)] {
            if let Some(n) = text.strip_prefix(prefix) {
                return Some(number(n)?).filter(|&n| n > 0).map(spec).ok_or_else(fail);
            }
        }
        let mut layers = BTreeSet::new();
        for part in text.split(',') {
            match part.split_once('-') {
                Some((first, last)) => {
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last {
                        return Err(fail());
                    }
                    layers.extend(first..=last);
                }
                None => layers.extend([number(part)?]),
            }
        }
        Ok(LayerSpec::List(layers.into_iter().collect()))
    }
}

impl fmt::Display for LayerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayerSpec::Last(n) => write!(f, "last:{n}"),
            LayerSpec::Auto(n) => write!(f, "auto:{n}"),
            LayerSpec::All => f.write_str("all"),
            LayerSpec::List(list) => f.write_str(&list.iter().map(usize::to_string).collect::<Vec<_>>().join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use std::fs;

    fn set() -> RouterSet {
        RouterSet {
            settings: RouterSettings { select: Select::TopK, capacity: 0.3, ..RouterSettings::default() },
            weights: [(1, vec![0.5, -1.25]), (10, vec![1e-30, 3.0])].into(),
            thresholds: [(1, 0.4375), (10, 0.51)].into(),
            fingerprint: Some("ab".into()),
            metadata: [("author".into(), "me".into())].into(),
            path: PathBuf::new(),
        }
    }

    #[test]
    fn a_saved_set_comes_back_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.safetensors");
        set().save(&path).unwrap();
        let mut back = RouterSet::open(&path).unwrap();
        assert_eq!(back.metadata.remove("format").as_deref(), Some(FORMAT));
        assert_eq!(back, RouterSet { path: path.clone(), ..set() });
        back.save(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), set().to_bytes());
        assert!(safetensors::SafeTensors::deserialize(&set().to_bytes()).is_ok());
    }

    #[test]
    fn foreign_metadata_does_not_spoil_what_is_saved() {
        let foreign = [("format", "pt"), ("capacity", "5.5"), ("author", "me")].map(|(k, v)| (k.into(), v.into()));
        let set = RouterSet { settings: RouterSettings::default(), metadata: foreign.into(), ..set() };
        let back = RouterSet::from_bytes(Path::new("r"), Bytes::new(set.to_bytes())).unwrap();
        assert_eq!((back.settings, back.metadata["author"].as_str()), (set.settings, "me"));
    }

    #[test]
    fn bare_files_and_foreign_dtypes_load() {
        let half = half::bf16::from_f32(0.75).to_le_bytes().repeat(4);
        let view = safetensors::tensor::TensorView::new(Dtype::BF16, vec![4], &half).unwrap();
        let bytes = safetensors::serialize([("model.layers.3.router.weight", view)], None).unwrap();
        let set = RouterSet::from_bytes(Path::new("r"), Bytes::new(bytes)).unwrap();
        assert_eq!((set.settings, &set.weights[&3][..]), (RouterSettings::default(), &[0.75; 4][..]));
    }

    #[test]
    fn folders_of_the_published_code_load() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let zeros = [0u8; 8];
        let view = |shape| safetensors::tensor::TensorView::new(Dtype::F32, shape, &zeros).unwrap();
        let tensors = [
            ("model.layers.0.router.weight", view(vec![1, 2])),
            ("model.layers.1.router.weight", view(vec![1, 2])),
            ("model.norm.weight", view(vec![2])),
        ];
        let pt = Some([("format".to_string(), "pt".to_string())].into());
        fs::write(&file, safetensors::serialize(tensors, pt).unwrap()).unwrap();
        let config = r#"{"is_mod": [false, true, false], "granularity": "mlp-sequence", "threshold": 0.25, "mod_capacity": null}"#;
        fs::write(dir.path().join("config.json"), config).unwrap();
        for path in [dir.path(), file.as_path()] {
            let set = RouterSet::open(path).unwrap();
            assert_eq!(set.settings.granularity.to_string(), "mlp_sequence");
            assert_eq!((set.settings.keys, set.settings.threshold), (Keys::All, 0.25));
            assert_eq!(set.weights.keys().collect::<Vec<_>>(), [&1]);
        }
        fs::write(dir.path().join("config.json"), r#"{"is_mindskip": [false, false, true]}"#).unwrap();
        let error = RouterSet::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.json: routes layer 2, but there is no router for it; "), "{error}");
    }

    #[test]
    fn settings_out_of_range_or_unknown_are_refused() {
        for (key, value, message) in [
            ("threshold", "NaN", "threshold is NaN"),
            ("threshold", "2", "[0, 1]"),
            ("capacity", "0", "(0, 1]"),
            ("granularity", "attn", "attn_token, attn_sequence, mlp_token"),
            ("keys", "none", "all, active"),
            ("layers", "1", "routers for 1,10"),
            ("thresholds", "0.5", "not one within [0, 1] for each of the layers 1,10"),
            ("thresholds", "0.5,NaN", "not one within [0, 1]"),
            ("thresholds", "0.5,1.5", "not one within [0, 1]"),
            ("thresholds", "0.5,0.5,0.5", "not one within [0, 1]"),
            ("format", "mindskip-routers-2", "update mindskip"),
        ] {
            let text = String::from_utf8_lossy(&set().to_bytes()[8..]).into_owned();
            let header = &text[..text.find("}}").map_or(0, |i| i + 2)];
            let mut header: serde_json::Value = serde_json::from_str(header.trim()).unwrap();
            header["__metadata__"][key] = value.into();
            let header = header.to_string();
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.bytes());
            bytes.extend(&set().to_bytes()[set().to_bytes().len() - 16..]);
            let error = RouterSet::from_bytes(Path::new("r.safetensors"), Bytes::new(bytes)).unwrap_err().to_string();
            assert!(error.starts_with("r.safetensors: ") && error.contains(message), "{error}");
        }
    }

    #[test]
    fn overrides_win_and_are_checked() {
        let wanted = Overrides { keys: Some(Keys::Active), threshold: Some(0.9), ..Overrides::default() };
        let settings = wanted.apply(RouterSettings::default()).unwrap();
        assert_eq!((settings.keys, settings.threshold, settings.select), (Keys::Active, 0.9, Select::Threshold));
        assert!(Overrides { threshold: Some(f32::NAN), ..Overrides::default() }.apply(settings).is_err());
        let mut set = set();
        set.apply(&Overrides::default()).unwrap();
        assert_eq!((set.threshold(1), set.threshold(10)), (0.4375, 0.51));
        set.apply(&wanted).unwrap();
        assert_eq!((set.threshold(1), set.threshold(10)), (0.9, 0.9));
        for name in Granularity::NAMES {
            assert_eq!(name.parse::<Granularity>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn layers_are_named_in_four_ways() {
        let layers = |text: &str| text.parse::<LayerSpec>().and_then(|spec| spec.resolve(12));
        assert_eq!(layers("last:3").unwrap(), [8, 9, 10]);
        assert_eq!(layers("3-5, 1,4").unwrap(), [1, 3, 4, 5]);
        assert_eq!(layers("all").unwrap().len(), 12);
        assert_eq!(layers("last:11").unwrap().len(), 11);
        let wrong = ["last:12", "last:0", "last:", "", "12", "5-3", "1,,2", "-1", "1-", "last:99999999999"];
        for wrong in wrong.into_iter().chain(["auto:0", "auto:13", "auto:", "auto", "auto:-1", "auto:3"]) {
            assert!(layers(wrong).unwrap_err().to_string().contains("; "), "{wrong}");
        }
        assert_eq!("auto:3".parse::<LayerSpec>().unwrap(), LayerSpec::Auto(3));
    }
}
