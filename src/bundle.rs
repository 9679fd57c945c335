//! From what a user names to a model: the embedded one, a folder, or an id on the Hugging Face hub.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::chat::ChatTemplate;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::generation::GenerationConfig;
use crate::router::RouterSet;
use crate::tensor::Bytes;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// The name of the model inside the program: small, tells children's stories, and has trained routers. A folder of this
/// name is written `./stories`.
pub const EMBEDDED: &str = "stories";

/// A model as it is on disk, or in the program: everything but the running.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::bundle::{Bundle, EMBEDDED};
///
/// let bundle = Bundle::load(EMBEDDED)?; // or a folder, or an id on the hub
/// let ids = bundle.tokenizer()?.encode("Tom had", true)?;
/// assert_eq!((bundle.bos(), bundle.eos(), ids[0]), (Some(0), &[0][..], 0));
/// assert!(bundle.routers.is_some() && bundle.chat_template()?.is_none());
///
/// let folder = Bundle::open(Path::new("assets/stories"))?;
/// assert_eq!(folder.weights.fingerprint(), bundle.weights.fingerprint());
/// assert_eq!(folder.path("config.json"), Path::new("assets/stories/config.json"));
/// assert_eq!(folder.file("config.json")?.as_deref(), bundle.file("config.json")?.as_deref());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug)]
pub struct Bundle {
    /// What to call it: `stories`, the folder's name, or `org/name`.
    pub name: String,
    /// Its folder; None: it is embedded.
    pub dir: Option<PathBuf>,
    /// `config.json`.
    pub config: Config,
    /// Mapped, or in place in the program.
    pub weights: Weights,
    /// `generation_config.json`, or the defaults when there is none.
    pub generation: GenerationConfig,
    /// The routers that the model comes with: those of the embedded one. What lies in a folder is used when it is asked
    /// for, by [`RouterSet::open`].
    pub routers: Option<RouterSet>,
}

impl Bundle {
    /// The model that `name` stands for, see [`Source::find`], downloaded when need be.
    ///
    /// Errors: those of [`Source::find`], [`Bundle::open`] and `Hub::fetch`; Unsupported for an id without the feature `hub`.
    pub fn load(name: &str) -> Result<Bundle> {
        match Source::find(name)? {
            Source::Embedded => Self::embedded(),
            Source::Dir(dir) => Self::open(&dir),
            Source::Hub(id) => Ok(Bundle { name: id.to_string(), ..Self::open(&fetch(&id)?)? }),
        }
    }

    /// Reads a folder with `config.json`, safetensors and, perhaps, `generation_config.json`. The weights are mapped.
    ///
    /// Errors: Io; Format; Unsupported.
    pub fn open(dir: &Path) -> Result<Bundle> {
        let read = |name: &str| files::read_if_exists(&dir.join(name));
        let Some(config) = read("config.json")? else {
            return Err(Error::new(Kind::Io, "no config.json").at(dir).action(match contains(dir, "gguf") {
                true => "GGUF files are not read here: give the folder of the model they were made from",
                false => "give the folder of a model: config.json and safetensors weights",
            }));
        };
        let config = Config::parse(&config).map_err(|e| e.at(dir.join("config.json")))?;
        let generation = match read("generation_config.json")? {
            Some(bytes) => GenerationConfig::parse(&bytes).map_err(|e| e.at(dir.join("generation_config.json")))?,
            None => GenerationConfig::default(),
        };
        let weights = Weights::open(dir)?;
        let full = fs::canonicalize(dir).unwrap_or_else(|_| dir.into()); // "." has no name
        let name = full.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into());
        Ok(Bundle { name, dir: Some(dir.into()), config, weights, generation, routers: None })
    }

    /// The model inside the program, with its routers. Nothing is read and no weight is copied.
    ///
    /// Errors: none, but in a program that was built from damaged assets.
    pub fn embedded() -> Result<Bundle> {
        let asset = |name: &str| {
            let bytes =
                embedded_file(name).ok_or_else(|| Error::new(Kind::Format, format!("{name} is not embedded")))?;
            Ok((embedded_path(name), bytes))
        };
        let (path, bytes) = asset("config.json")?;
        let config = Config::parse(bytes).map_err(|e| e.at(path))?;
        let (path, bytes) = asset("generation_config.json")?;
        let generation = GenerationConfig::parse(bytes).map_err(|e| e.at(path))?;
        let (path, bytes) = asset("model.safetensors")?;
        let weights = Weights::from_parts(vec![(path, Bytes::new(bytes))])?;
        let (path, bytes) = asset("routers.safetensors")?;
        let routers = Some(RouterSet::from_bytes(&path, Bytes::new(bytes))?);
        Ok(Bundle { name: EMBEDDED.into(), dir: None, config, weights, generation, routers })
    }

    /// The bytes of a file of the model, such as `tokenizer.json`; None when it has none of that name.
    ///
    /// Errors: Io; Argument when the name is not that of a file in the folder.
    pub fn file(&self, name: &str) -> Result<Option<Bytes>> {
        if !files::is_inside(name) {
            return Err(Error::new(Kind::Argument, format!("{name:?} names no file of a model")));
        }
        Ok(match &self.dir {
            Some(dir) => files::read_if_exists(&dir.join(name))?.map(Bytes::new),
            None => embedded_file(name).map(Bytes::new),
        })
    }

    /// The tokenizer, checked against the vocabulary. Errors: Io when there is none; Format; Mismatch.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let path = self.path("tokenizer.json");
        let Some(json) = self.file("tokenizer.json")? else {
            return Err(Error::new(Kind::Io, "no tokenizer.json").at(path).action("get it where the model is from"));
        };
        let tokenizer = Tokenizer::from_bytes(path, &json, self.file("tokenizer_config.json")?.as_deref())?;
        tokenizer.check(self.config.vocab)?;
        Ok(tokenizer)
    }

    /// The chat template, if the model has one. Errors: Io; Format.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        self.dir.as_deref().map_or(Ok(None), ChatTemplate::open)
    }

    /// The path of a file of the model, whether it exists or not; of the embedded one, something for messages.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.as_ref().map_or_else(|| embedded_path(name), |dir| dir.join(name))
    }

    /// The tokens that end a generation: those of `generation_config.json` when it names any, else of `config.json`.
    pub fn eos(&self) -> &[u32] {
        if self.generation.eos.is_empty() { &self.config.eos } else { &self.generation.eos }
    }

    /// Begin-of-sequence token, from the same files.
    pub fn bos(&self) -> Option<u32> {
        self.generation.bos.or(self.config.bos)
    }
}

fn contains(dir: &Path, extension: &str) -> bool {
    let mut entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.any(|entry| entry.path().extension().is_some_and(|e| e.eq_ignore_ascii_case(extension)))
}

#[cfg(feature = "hub")]
fn fetch(id: &HubId) -> Result<PathBuf> {
    crate::hub::Hub::from_env().fetch(id)
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &HubId) -> Result<PathBuf> {
    let cause = format!("{id} is a Hugging Face id, and this program was built without the feature `hub`");
    Err(Error::new(Kind::Unsupported, cause)
        .action("build it with the feature, or download the model and give its folder"))
}

/// `include_bytes!` aligns to nothing; tensors that are not aligned would be copied when they are loaded.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// A file of the embedded model.
fn embedded_file(name: &str) -> Option<&'static [u8]> {
    macro_rules! one_of {
        ($($file:literal),+ $(,)?) => {
            match name {
                $($file => {
                    static FILE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!("../assets/stories/", $file)));
                    Some(&FILE.0)
                })+
                _ => None,
            }
        };
    }
    one_of!(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "routers.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
}

fn embedded_path(name: &str) -> PathBuf {
    format!("{EMBEDDED} (embedded)/{name}").into()
}

/// Where a model is.
///
/// ```
/// use mindskip::bundle::Source;
///
/// assert_eq!(Source::find("stories")?, Source::Embedded);
/// assert_eq!(Source::find("assets/stories")?, Source::Dir("assets/stories".into()));
/// assert_eq!(Source::find("Qwen/Qwen3-0.6B")?, Source::Hub("Qwen/Qwen3-0.6B".parse()?));
/// assert!(Source::find("model.gguf").is_err());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// In the program.
    Embedded,
    /// In a folder.
    Dir(PathBuf),
    /// On the Hugging Face hub, or in its cache.
    Hub(HubId),
}

impl Source {
    /// What a name stands for: `stories`, the embedded model; a folder that exists; otherwise an id on the hub, `org/name`
    /// or `org/name@revision`.
    ///
    /// Errors: Argument when it is none of them, with what to give instead; Unsupported for GGUF files.
    pub fn find(name: &str) -> Result<Source> {
        let path = Path::new(name);
        if name == EMBEDDED {
            return Ok(Source::Embedded);
        }
        if path.is_dir() {
            return Ok(Source::Dir(path.into()));
        }
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            return Err(Error::new(Kind::Unsupported, "GGUF files are not read here").at(path).action(
                "give the model it was made from: its Hugging Face id, or a folder with config.json and safetensors",
            ));
        }
        if path.exists() {
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            return Err(Error::new(Kind::Argument, "a file, where the folder of a model is needed")
                .at(path)
                .action(format!("give its folder: {}", folder.display())));
        }
        name.parse().map(Source::Hub)
    }
}

/// A model on the hub: `org/name`, at a branch, tag or commit when `@revision` follows.
///
/// ```
/// use mindskip::bundle::HubId;
///
/// let id: HubId = "Qwen/Qwen3-0.6B@main".parse()?;
/// assert_eq!((id.repo().as_str(), id.revision.as_deref()), ("Qwen/Qwen3-0.6B", Some("main")));
/// assert!("../Qwen3-0.6B".parse::<HubId>().is_err());
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `org`
    pub owner: String,
    /// `name`
    pub name: String,
    /// None: `main`.
    pub revision: Option<String>,
}

impl HubId {
    /// `org/name`
    pub fn repo(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

impl FromStr for HubId {
    type Err = Error;

    /// The parts become folders of the cache, so nothing passes that could leave it. The rules are those of the hub.
    fn from_str(text: &str) -> Result<HubId> {
        let fail = || {
            Error::new(Kind::Argument, format!("{text:?} is no folder, and no Hugging Face id"))
                .action(format!("give the folder of a model, an id (org/name or org/name@revision), or {EMBEDDED}"))
        };
        let (repo, revision) = match text.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = repo.split_once('/').ok_or_else(fail)?;
        let is_name = |s: &str| {
            let edge = |c: Option<char>| c.is_some_and(|c| c != '.' && c != '-');
            s.len() <= 96
                && s.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
                && edge(s.chars().next())
                && edge(s.chars().last())
                && !s.contains("..")
                && !s.contains("--")
        };
        let is_revision = |s: &str| {
            let part = |p: &str| !p.is_empty() && !p.starts_with('.') && !p.contains("..");
            s.len() <= 250
                && s.split('/').all(part)
                && s.chars().all(|c| c.is_ascii_graphic() && !r#"\:?*"<>|[~^"#.contains(c))
        };
        if !is_name(owner) || !is_name(name) || !revision.is_none_or(is_revision) {
            return Err(fail());
        }
        Ok(HubId { owner: owner.into(), name: name.into(), revision: revision.map(Into::into) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn assets() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/stories")
    }

    #[test]
    fn the_embedded_model_is_whole_and_its_weights_are_used_in_place() {
        let bundle = Bundle::embedded().unwrap();
        let routers = bundle.routers.as_ref().unwrap();
        routers.check(&bundle.config, &bundle.weights.fingerprint()).unwrap();
        assert_eq!((bundle.name.as_str(), bundle.dir.as_deref(), bundle.eos()), ("stories", None, &[0][..]));

        let program = embedded_file("model.safetensors").unwrap().as_ptr_range();
        for (name, rows, cols) in [("model.embed_tokens.weight", 1536, 128), ("model.norm.weight", 1, 128)] {
            let tensor = bundle.weights.tensor(name, rows, cols).unwrap();
            assert_eq!(tensor.dtype, DType::BF16);
            assert!(program.contains(&tensor.bytes().as_ptr()), "{name} was copied");
        }
    }

    #[test]
    fn a_folder_gives_what_the_program_gives() {
        let (inside, outside) = (Bundle::embedded().unwrap(), Bundle::open(&assets()).unwrap());
        assert_eq!(outside.config, inside.config);
        assert_eq!(outside.generation, inside.generation);
        assert_eq!(outside.weights.fingerprint(), inside.weights.fingerprint());
        assert_eq!((outside.name.as_str(), outside.dir.as_deref()), ("stories", Some(assets().as_path())));
        assert!(outside.routers.is_none(), "a file beside the model is used when it is asked for");
        for name in ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"] {
            let [a, b] = [&inside, &outside].map(|bundle| bundle.file(name).unwrap());
            assert_eq!(a.as_deref(), b.as_deref(), "{name}");
            assert_eq!(a.is_some(), name != "chat_template.jinja");
        }
        for name in ["../config.json", "/etc/passwd", "", ".."] {
            assert_eq!(outside.file(name).unwrap_err().kind(), Kind::Argument, "{name}");
        }
        assert_eq!(outside.path("a.json"), assets().join("a.json"));
        assert_eq!(inside.path("a.json"), Path::new("stories (embedded)/a.json"));
    }

    #[test]
    fn broken_folders_are_refused_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let fails = |kind, path: &Path, message: &str| {
            let error = Bundle::open(dir.path()).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert_eq!(error.path(), Some(path), "{error}");
            assert!(error.to_string().contains(message), "{error}");
        };
        fails(Kind::Io, dir.path(), "no config.json; give the folder of a model");
        fs::write(at("model.Q4.GGUF"), "").unwrap();
        fails(Kind::Io, dir.path(), "no config.json; GGUF files are not read");
        fs::write(at("config.json"), "{").unwrap();
        fails(Kind::Format, &at("config.json"), "not a model configuration");
        fs::copy(assets().join("config.json"), at("config.json")).unwrap();
        fails(Kind::Io, dir.path(), "no model.safetensors");
        fs::write(at("generation_config.json"), r#"{"top_p": 2}"#).unwrap();
        fails(Kind::Format, &at("generation_config.json"), "top_p is 2");
        fs::write(at("generation_config.json"), r#"{"eos_token_id": [5, 6], "bos_token_id": 4}"#).unwrap();
        fs::write(at("model.safetensors"), "??").unwrap();
        fails(Kind::Format, &at("model.safetensors"), "2 bytes are no safetensors file");
        fs::copy(assets().join("model.safetensors"), at("model.safetensors")).unwrap();
        let bundle = Bundle::open(dir.path()).unwrap();
        assert_eq!((bundle.eos(), bundle.bos()), (&[5, 6][..], Some(4)), "the newer file wins");
        fs::remove_file(at("generation_config.json")).unwrap();
        let bundle = Bundle::open(dir.path()).unwrap();
        assert_eq!((bundle.eos(), bundle.bos(), &bundle.generation), (&[0][..], Some(0), &GenerationConfig::default()));
    }

    #[test]
    fn names_stand_for_what_they_look_like() {
        let id = |owner: &str, name: &str, revision: Option<&str>| {
            Source::Hub(HubId { owner: owner.into(), name: name.into(), revision: revision.map(Into::into) })
        };
        let folder = assets();
        let folder = folder.to_str().unwrap();
        for (name, source) in [
            ("stories", Source::Embedded),
            (folder, Source::Dir(assets())),
            (".", Source::Dir(".".into())),
            ("HuggingFaceTB/SmolLM2-135M", id("HuggingFaceTB", "SmolLM2-135M", None)),
            ("a/b_1.5@refs/pr/3", id("a", "b_1.5", Some("refs/pr/3"))),
            ("a/b@0123abc", id("a", "b", Some("0123abc"))),
        ] {
            let found = Source::find(name).unwrap();
            assert_eq!(found, source);
            if let Source::Hub(id) = found {
                assert_eq!(id.to_string(), name);
            }
        }
    }

    #[test]
    fn other_names_are_refused_with_what_to_give() {
        for name in [
            "",
            "gpt2",
            "/absent/folder",
            "./absent",
            "../absent-a/b",
            "a/b/c",
            "a/",
            "/absent-a",
            "a//b",
            "a/b@",
            "a/b@../x",
            "a/b@/x",
            "a/b@x/../y",
            "a/b@x\\y",
            "a/b@.x",
            "a/b c",
            "a/..",
            "../absent-b",
            "a/.b",
            "a/b--c",
            "-a/b",
            "~/models",
            "ä/b",
            "https://huggingface.co/a/b",
            "a/b@x y",
        ] {
            let error = Source::find(name).unwrap_err();
            assert_eq!(error.kind(), Kind::Argument, "{name}");
            assert!(error.to_string().contains("; give the folder of a model, an id (org/name"), "{error}");
        }
        let file = assets().join("model.safetensors");
        let error = Source::find(file.to_str().unwrap()).unwrap_err();
        assert_eq!((error.kind(), error.path()), (Kind::Argument, Some(file.as_path())));
        assert!(error.to_string().ends_with(&format!("; give its folder: {}", assets().display())), "{error}");
        assert!(Source::find("Cargo.toml").unwrap_err().to_string().ends_with("; give its folder: ."));
        for name in ["model.gguf", "org/model.Q4_K_M.GGUF"] {
            let error = Source::find(name).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.to_string().contains("; give the model it was made from"), "{error}");
        }
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn without_the_feature_an_id_says_so() {
        let error = Bundle::load("a/b").unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains("without the feature `hub`; "), "{error}");
    }
}
