//! Chat templates: a conversation to the text that the model was trained on.
//!
//! Templates are Jinja, written for transformers, so they are rendered as transformers renders them: blocks are trimmed,
//! strings have Python's methods, `tojson` is `json.dumps`, `raise_exception`, `strftime_now`, `break`, `continue` and
//! `{% generation %}` are known, nothing is escaped. They come with models from anywhere, so the work that one may do, the
//! depth of its calls, the stack they take and, where all else fails, the time are bounded.

mod json;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use jiff::civil::DateTime;
use jiff::fmt::strtime::{BrokenDownTime, Config, PosixCustom};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, from_args};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value};
use minijinja_contrib::pycompat;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::error::{Error, Kind, Result};
use crate::files;
use crate::tokenizer::Settings;

/// What a render may cost, in instructions or blocks of 64 bytes: this, and for every message, and for every byte that goes
/// in. Real templates need about 100, 100 and 0.1.
const FUEL: u64 = 400_000;
const FUEL_PER_MESSAGE: u64 = 500;
const FUEL_PER_BYTE: u64 = 1;
/// Bytes of stack for a unit of fuel: it can wrap a list in a list, and dropping one takes about 100.
const STACK_PER_FUEL: u64 = 128;
/// Bytes of stack for a byte of source. minijinja parses `1-1-1` and `elif` by recursion; a level takes up to 2 KiB.
const STACK_PER_BYTE: u64 = 2048;
/// What fits into one stack, on a machine that is not short of addresses.
const MAX_STACK: u64 = 1 << 30;
/// Templates are at most this long, in bytes; real ones reach 30 thousand.
const MAX_SOURCE: usize = 1 << 18;
/// How long compiling, or rendering an ordinary conversation, may take. Fuel ends most of what does not end by itself, but
/// minijinja walks lists that hold one list many times over for free.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the template is called in minijinja.
const NAME: &str = "chat template";

/// One message of a conversation.
///
/// ```
/// use mindskip::chat::Message;
///
/// let message = Message::new("user", "What is gravity?");
/// let same: Message = serde_json::from_str(r#"{"role": "user", "content": "What is gravity?"}"#).unwrap();
/// assert_eq!(message, same);
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// Text, or whatever the template takes besides: a list of parts, the result of a tool. Null is as good as absent.
    #[serde(default, skip_serializing_if = "Json::is_null")]
    pub content: Json,
    /// Further fields, such as `tool_calls`.
    #[serde(flatten)]
    pub other: Map<String, Json>,
}

impl Message {
    /// What somebody says, as text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: Json::String(content.into()), other: Map::new() }
    }
}

/// A chat template, compiled. May be used from any thread.
///
/// ```
/// use std::path::Path;
///
/// use mindskip::chat::{ChatTemplate, Message};
///
/// let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>";
/// let template = ChatTemplate::new("chat_template.jinja", source)?;
/// let template = template.with_variables([("eos_token".into(), "</s>".into())]);
/// let text = template.render(&[Message::new("user", "Hi")], true, &serde_json::Map::new())?;
/// assert_eq!(text, "<user>Hi</s><assistant>");
/// assert!(ChatTemplate::open(Path::new("assets/stories"))?.is_none(), "a base model has none");
/// # Ok::<(), mindskip::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    /// The file it is from, for messages.
    path: PathBuf,
    environment: Environment<'static>,
    /// Variables that every conversation has: the special tokens.
    variables: Map<String, Json>,
    patience: Duration,
}

impl ChatTemplate {
    /// The template of the model in `dir`: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json` (of
    /// several there, the one called "default"). `None` when it has none, as base models have.
    ///
    /// The template sees the special tokens that `tokenizer_config.json` names.
    ///
    /// Errors: Io; Format when a file is broken.
    pub fn open(dir: &Path) -> Result<Option<ChatTemplate>> {
        let (jinja, config) = (dir.join("chat_template.jinja"), dir.join("tokenizer_config.json"));
        let template = files::read_if_exists(&jinja)?;
        let settings = files::read_if_exists(&config)?
            .map(|bytes| Settings::parse(&bytes).map_err(|e| e.at(&config)))
            .transpose()?
            .unwrap_or_default();
        let template = match (template, settings.chat_template) {
            (Some(bytes), _) => {
                let source = String::from_utf8(bytes)
                    .map_err(|e| Error::new(Kind::Format, format!("not UTF-8: {e}")).at(&jinja).action(OTHER))?;
                Self::new(&jinja, &source)?
            }
            (None, Some(value)) => match default_template(value) {
                Some(source) => Self::new(&config, &source)?,
                None => return Ok(None),
            },
            (None, None) => return Ok(None),
        };
        let named = settings.named.into_iter().map(|(name, token)| (name.into(), Json::String(token.content)));
        Ok(Some(template.with_variables(named)))
    }

    /// Compiles a template; the path is for messages only.
    ///
    /// Errors: Format, with the line; Unsupported for what is too long.
    pub fn new(path: impl AsRef<Path>, source: &str) -> Result<ChatTemplate> {
        let path = path.as_ref().to_owned();
        if source.len() > MAX_SOURCE {
            let cause = format!("a template of {} bytes; the limit is {MAX_SOURCE}", source.len());
            return Err(Error::new(Kind::Unsupported, cause).at(path).action(OTHER));
        }
        // Jinja2 reads all line ends as \n.
        let source = without_generation(&source.replace("\r\n", "\n").replace('\r', "\n"));
        let stack = source.len() as u64 * STACK_PER_BYTE;
        let compiled = aside(stack, PATIENCE, move || {
            let mut environment = Environment::new();
            environment.set_debug(false);
            environment.set_auto_escape_callback(|_| AutoEscape::None);
            environment.set_unknown_method_callback(string_method);
            let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
            environment.set_syntax(syntax.expect("the default delimiters are valid"));
            environment.add_filter("tojson", json::tojson);
            environment.add_function("raise_exception", raise_exception);
            environment.add_template_owned(NAME, source).map(|()| environment)
        });
        let environment = compiled.and_then(|result| result.map_err(|e| explain(&e))).map_err(|e| e.at(&path))?;
        Ok(ChatTemplate { path, environment, variables: Map::new(), patience: PATIENCE })
    }

    /// Adds variables that every conversation has, such as `bos_token` and `eos_token`. Those of before give way.
    pub fn with_variables(mut self, variables: impl IntoIterator<Item = (String, Json)>) -> ChatTemplate {
        self.variables.extend(variables);
        self
    }

    /// The text of a conversation, up to where the assistant is to speak when `add_generation_prompt`.
    ///
    /// `variables` are what else the template may ask for: `tools`, `enable_thinking`, `date_string`. It sees the text with
    /// the special tokens spelled out, so the tokenizer adds none when it encodes it.
    ///
    /// Errors: Argument when the template refuses the messages; Format when it fails on them; Unsupported when it does more
    /// work than any real one.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &Map<String, Json>,
    ) -> Result<String> {
        self.render_at(messages, add_generation_prompt, variables, || jiff::ZonedDateTime::now().datetime())
    }

    fn render_at(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &Map<String, Json>,
        now: impl Fn() -> DateTime + Send + Sync + 'static,
    ) -> Result<String> {
        let strftime_now = move |format: &str| {
            let config = Config::new().custom(PosixCustom::new()).lenient(true);
            BrokenDownTime::from(now())
                .to_string_with_config(&config, format)
                .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
        };
        // As in transformers, tools and documents are always there, and messages have no fields that are null.
        let mut context = vec![
            (Cow::from("tools"), Value::from(())),
            ("documents".into(), Value::from(())),
            ("strftime_now".into(), Value::from_function(strftime_now)),
        ];
        for (name, value) in self.variables.iter().chain(variables) {
            context.push((name.clone().into(), Value::from(Serde(value))));
        }
        let mut bytes = variables.iter().map(|(_, value)| size(value)).sum::<u64>();
        let mut list = Vec::with_capacity(messages.len());
        for message in messages {
            let role = Json::String(message.role.clone());
            let fields = [("role", &role), ("content", &message.content)];
            let fields = fields.into_iter().chain(message.other.iter().map(|(name, value)| (name.as_str(), value)));
            let fields: Vec<_> = fields.filter(|(_, value)| !value.is_null()).collect();
            bytes += fields.iter().map(|(_, value)| size(value)).sum::<u64>();
            list.push(Value::from_pairs(fields.into_iter().map(|(name, value)| (name, Value::from(Serde(value))))));
        }
        context.push(("messages".into(), Value::from(list)));
        context.push(("add_generation_prompt".into(), add_generation_prompt.into()));

        let cost = [FUEL, FUEL_PER_MESSAGE.saturating_mul(messages.len() as u64), FUEL_PER_BYTE.saturating_mul(bytes)];
        let fuel = cost.into_iter().fold(0, u64::saturating_add);
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let context = Value::from_pairs(context);
        let patience = self.patience + Duration::from_secs(bytes >> 18);
        let stack = fuel.saturating_mul(STACK_PER_FUEL);
        let text = aside(stack, patience, move || environment.get_template(NAME)?.render(context));
        text.and_then(|result| result.map_err(|e| explain(&e)))
            .map_err(|e| e.at(&self.path).during("rendering the chat template"))
    }
}

/// Runs something on a thread of its own, with some MiB and `stack` more bytes of stack, and waits for it for so long.
///
/// Errors: Unsupported when it takes longer, in which case it is left to itself; Memory when there is no such thread.
fn aside<T: Send + 'static>(stack: u64, patience: Duration, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let stack = stack.saturating_add(8 << 20).min(MAX_STACK) as usize;
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new().name(NAME.into()).stack_size(stack);
    thread.spawn(move || sender.send(work()).ok()).map_err(|e| {
        let cause = format!("no thread with a stack of {} MiB for the chat template: {e}", stack >> 20);
        Error::new(Kind::Memory, cause).action("raise the limits of the process, see ulimit -v and -u")
    })?;
    receiver.recv_timeout(patience).map_err(|e| match e {
        mpsc::RecvTimeoutError::Timeout => endless(""),
        mpsc::RecvTimeoutError::Disconnected => Error::new(Kind::Format, "minijinja panicked").action(OTHER),
    })
}

/// minijinja's error as one of ours, without the path.
fn explain(error: &minijinja::Error) -> Error {
    if let Some(raised) = raised(error) {
        let action = "give it messages with the roles, in the order, that it accepts";
        return Error::new(Kind::Argument, raised).action(action);
    }
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    let detail = error.detail().map_or(String::new(), |detail| format!(": {detail}"));
    let format = Error::new(Kind::Format, format!("{line}{}{detail}", error.kind()));
    match error.kind() {
        ErrorKind::OutOfFuel => endless(&line),
        ErrorKind::SyntaxError => format.action(OTHER),
        _ => format
            .action("check that the messages are as the template expects them, or give another chat_template.jinja"),
    }
}

fn endless(line: &str) -> Error {
    Error::new(Kind::Unsupported, format!("{line}the template does not come to an end")).action(OTHER)
}

const OTHER: &str = "give another chat_template.jinja";

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// What a template passed to `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// The message of `raise_exception`, if that is where an error comes from.
fn raised(error: &minijinja::Error) -> Option<&str> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message);
        }
        source = error.source();
    }
    None
}

/// `chat_template` in tokenizer_config.json: a template, or a list of named ones.
fn default_template(value: Json) -> Option<String> {
    match value {
        Json::String(source) => Some(source),
        Json::Array(list) => {
            let default = list.into_iter().find(|entry| entry["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

/// Writes the tags `generation` and `endgeneration` as `with` and `endwith`: a scope. (transformers marks with them what
/// the assistant said, for training.)
fn without_generation(source: &str) -> String {
    let mut parts = source.split("{%");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (open, mut rest) = part.split_at(part.len() - part.trim_start_matches(['-', '+']).trim_start().len());
        out.extend(["{%", open]);
        for (old, new) in [("generation", "with"), ("endgeneration", "endwith")] {
            let after = rest.strip_prefix(old);
            if let Some(after) = after.filter(|a| a.trim_start().trim_start_matches(['-', '+']).starts_with("%}")) {
                out.push_str(new);
                rest = after;
                break;
            }
        }
        out.push_str(rest);
    }
    out
}

/// Python's methods of strings, lists and tables.
fn string_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    match (value.as_str(), method) {
        (Some(text), "title") => {
            let () = from_args(args)?;
            let mut after_letter = false;
            let mut title = String::with_capacity(text.len());
            for c in text.chars() {
                if after_letter {
                    title.extend(c.to_lowercase())
                } else {
                    title.extend(c.to_uppercase())
                }
                after_letter = c.is_alphabetic();
            }
            Ok(title.into())
        }
        (Some(text), "removeprefix" | "removesuffix") => {
            let (part,): (&str,) = from_args(args)?;
            let cut = if method == "removeprefix" { text.strip_prefix(part) } else { text.strip_suffix(part) };
            Ok(cut.unwrap_or(text).into())
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// About as many bytes as a value has when it is written down.
fn size(value: &Json) -> u64 {
    match value {
        Json::String(text) => text.len() as u64 + 2,
        Json::Array(list) => list.iter().map(size).sum::<u64>() + 2,
        Json::Object(table) => table.iter().map(|(key, value)| key.len() as u64 + size(value) + 4).sum::<u64>() + 2,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn goldens() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/chat")
    }

    #[derive(Deserialize)]
    struct Case {
        template: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
        messages: Vec<Message>,
        add_generation_prompt: bool,
        #[serde(default)]
        variables: Map<String, Json>,
        now: Option<String>,
        expected: Option<String>,
        error: Option<String>,
    }

    fn cases() -> Vec<Case> {
        serde_json::from_slice(&fs::read(goldens().join("cases.json")).unwrap()).unwrap()
    }

    fn tokens(bos: &Option<String>, eos: &Option<String>) -> impl Iterator<Item = (String, Json)> {
        let given = [("bos_token", bos), ("eos_token", eos)].into_iter();
        let known = given.filter_map(|(name, token)| token.clone().map(|token| (name.into(), Json::String(token))));
        known.collect::<Vec<_>>().into_iter()
    }

    fn table(value: Json) -> Map<String, Json> {
        value.as_object().unwrap().clone()
    }

    /// One template, rendered over a message that says "Hi".
    pub(super) fn render(source: &str, variables: Json) -> Result<String> {
        ChatTemplate::new("m/chat_template.jinja", source)?.render(
            &[Message::new("user", "Hi")],
            true,
            &table(variables),
        )
    }

    fn rendered(source: &str) -> String {
        render(source, json!({})).unwrap_or_else(|e| panic!("{source}: {e}"))
    }

    #[test]
    fn every_golden_is_as_in_transformers() {
        let cases = cases();
        assert!(cases.len() > 70 && cases.iter().any(|c| c.error.is_some()) && cases.iter().any(|c| c.now.is_some()));
        for case in cases {
            let path = goldens().join(&case.template);
            let template = ChatTemplate::new(&path, &fs::read_to_string(&path).unwrap()).unwrap();
            let template = template.with_variables(tokens(&case.bos_token, &case.eos_token));
            let now: Option<DateTime> = case.now.as_ref().map(|now| now.parse().unwrap());
            let now = move || now.expect("this case does not ask for the time");
            let result = template.render_at(&case.messages, case.add_generation_prompt, &case.variables, now);
            match (result, &case.expected, &case.error) {
                (Ok(text), Some(expected), None) => assert_eq!(&text, expected, "{}", case.template),
                (Err(error), None, Some(expected)) => {
                    assert_eq!(error.kind(), Kind::Argument);
                    let text = format!("{}: {expected} (while rendering the chat template); give", path.display());
                    assert!(error.to_string().starts_with(&text), "{error}");
                }
                (result, ..) => panic!("{}: {result:?}", case.template),
            }
        }
    }

    #[test]
    fn templates_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let open = || ChatTemplate::open(dir.path());
        let text = || open().unwrap().unwrap().render(&[Message::new("user", "Hi")], false, &Map::new()).unwrap();
        assert!(open().unwrap().is_none(), "a base model has none");
        let config = |template: Json| json!({"bos_token": {"content": "<s>"}, "chat_template": template}).to_string();
        write("tokenizer_config.json", &config(Json::Null));
        assert!(open().unwrap().is_none());
        write("tokenizer_config.json", &config("{{ bos_token }}1{{ eos_token is defined }}".into()));
        assert_eq!(text(), "<s>1False");
        let named = |name: &str| json!({"name": name, "template": format!("{{{{ bos_token }}}}{name}")});
        write("tokenizer_config.json", &config(json!([named("tool_use"), named("default")])));
        assert_eq!(text(), "<s>default");
        write("tokenizer_config.json", &config(json!([named("tool_use")])));
        assert!(open().unwrap().is_none());
        write("chat_template.jinja", "{{ bos_token }}{{ messages[0].content }}");
        assert_eq!(text(), "<s>Hi", "the file is used before the configuration");

        write("chat_template.jinja", "a\n{% if %}");
        let error = open().unwrap_err().to_string();
        assert!(
            error.contains("chat_template.jinja: line 2: syntax error: ")
                && error.ends_with("; give another chat_template.jinja"),
            "{error}"
        );
        fs::write(dir.path().join("chat_template.jinja"), b"\xff").unwrap();
        assert!(open().unwrap_err().to_string().contains("chat_template.jinja: not UTF-8"));
        write("tokenizer_config.json", "{");
        assert!(open().unwrap_err().to_string().contains("tokenizer_config.json: not a tokenizer configuration"));
    }

    #[test]
    fn variables_are_those_of_transformers() {
        assert_eq!(
            rendered("{{ tools is none }}{{ documents is defined }}{{ add_generation_prompt }}"),
            "TrueTrueTrue"
        );
        let variables = json!({"tools": [{"name": "f"}], "deep": {"b": 1, "a": [null, 1.5]}, "messages": []});
        let source = "{{ tools[0].name }} {{ deep | tojson }} {{ messages | length }}";
        assert_eq!(render(source, variables).unwrap(), r#"f {"b": 1, "a": [null, 1.5]} 1"#);
        let template = ChatTemplate::new("a", "{{ bos_token }}{{ eos_token }}").unwrap();
        let template = template.with_variables(tokens(&Some("<s>".into()), &None));
        assert_eq!(template.render(&[], false, &Map::new()).unwrap(), "<s>");
        assert_eq!(template.render(&[], false, &table(json!({"bos_token": "<t>"}))).unwrap(), "<t>");

        let message: Message =
            serde_json::from_value(json!({"role": "assistant", "content": null, "tool_calls": [1], "name": null}))
                .unwrap();
        let template = ChatTemplate::new("a", "{{ messages[0] | tojson }}").unwrap();
        let text = template.render(std::slice::from_ref(&message), false, &Map::new()).unwrap();
        assert_eq!(text, r#"{"role": "assistant", "tool_calls": [1]}"#, "what is null is left out");
        let user = serde_json::to_string(&Message::new("user", "Hi")).unwrap();
        assert_eq!(user, r#"{"role":"user","content":"Hi"}"#);
    }

    #[test]
    fn templates_for_transformers_work() {
        assert_eq!(rendered("{%- generation %}\n a {% set y = 1 %}{%- endgeneration -%}\n b{{ y }}"), " a b");
        assert_eq!(rendered("{%generation%}a{%+ endgeneration +%}\n{{ '{%' }} generation"), "a\n{% generation");
        assert_eq!(rendered("a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc\r\n"), "a\nb\nc");
        assert_eq!(
            rendered("{{ '<b>' }}{{ none }}{{ 1.0 }}{{ nothing }}{% for x in nothing %}x{% endfor %}"),
            "<b>None1.0"
        );
        assert_eq!(
            rendered("{{ 'a,b'.split(',')[-1].strip() }}{{ [3, 1] | sort | join('-') }}{{ {'a': 1}.items() | list }}"),
            "b1-3[('a', 1)]"
        );
        let now = || "2024-07-06T05:04:03".parse().unwrap();
        let template = ChatTemplate::new("a", "{{ strftime_now('%d %b %Y, %-d %B %H:%M:%S %A %% %!') }}").unwrap();
        let text = template.render_at(&[], false, &Map::new(), now).unwrap();
        assert_eq!(text, "06 Jul 2024, 6 July 05:04:03 Saturday % %!");
        let year: u32 = rendered("{{ strftime_now('%Y') }}").parse().unwrap();
        assert!(year >= 2024);
    }

    #[test]
    fn errors_name_file_line_and_action() {
        for (source, kind, message) in [
            (
                "a\n{{ raise_exception('No ' ~ messages[0].role) }}",
                Kind::Argument,
                "No user (while rendering the chat template); give",
            ),
            ("a\n{{ nothing.attr }}", Kind::Format, "line 2: undefined value"),
            ("\n\n{{ 1 + 'a' }}", Kind::Format, "line 3: invalid operation"),
            ("{% frobnicate %}", Kind::Format, "line 1: syntax error: unknown statement frobnicate"),
            ("{{ 'a' | frobnicate }}", Kind::Format, "unknown filter"),
            ("{{ 'a'.frobnicate() }}", Kind::Format, "unknown method"),
            ("{% include 'b' %}", Kind::Format, "template not found"),
        ] {
            let error = render(source, json!({})).unwrap_err();
            let text = error.to_string();
            assert_eq!(error.kind(), kind, "{text}");
            assert!(
                text.starts_with("m/chat_template.jinja: ") && text.contains(message) && text.contains("; "),
                "{text}"
            );
        }
    }

    #[test]
    fn hostile_templates_end() {
        let nested = |open: &str, close: &str| {
            let levels = (MAX_SOURCE - 100) / (open.len() + close.len());
            format!("{{{{ {}1{} }}}}", open.repeat(levels), close.repeat(levels))
        };
        let chain = |link: &str| format!("{{{{ 1{} }}}}", link.repeat((MAX_SOURCE - 100) / link.len()));
        let grow = |step: &str, rounds: usize| {
            format!(
                "{{% set ns = namespace(x=[1]) %}}{{% for i in range({rounds}) %}}{step}{{% endfor %}}{{{{ ns.x | tojson }}}}"
            )
        };
        let sixtyfold = format!("{{% set ns.x = {}ns.x{} %}}", "[".repeat(60), "]".repeat(60));
        let endless = "the template does not come to an end";
        for (source, message) in [
            ("{% for i in range(99999) %}{% for i in range(99999) %}x{% endfor %}{% endfor %}".into(), endless),
            ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}".into(), "recursion limit exceeded"),
            (grow("{% set ns.x = [ns.x, ns.x] %}", 60), endless),
            (grow("{% set ns.x = [ns.x] %}", 9_999), "tojson: more than 128 lists within lists"),
            (grow("{% set ns.x = {'a': ns.x} %}", 9_999), "tojson: more than 128 lists within lists"),
            (grow(&sixtyfold, 99_999), endless),
            ("{{ 'x' * 99999999999 }}".into(), endless),
            ("{{ range(99999999999) | list }}".into(), "range has too many elements"),
            (nested("(", ")"), "maximum recursion"),
            (nested("[", "]"), "maximum recursion"),
            (nested("not ", "|frobnicate"), "unknown filter"),
            (nested("-", "|frobnicate"), "unknown filter"),
            (chain("-1") + "{{ 1 | frobnicate }}", "unknown filter"),
            (chain(".a"), "undefined value"),
            (chain(" if 1 else 1") + "{{ 1 | frobnicate }}", "unknown filter"),
            (
                format!("{{% if 0 %}}{}{{% endif %}}{{{{ 1 | frobnicate }}}}", "{% elif 0 %}".repeat(20_000)),
                "unknown filter",
            ),
            ("x".repeat(MAX_SOURCE + 1), "a template of 262145 bytes"),
        ] {
            let start: String = source.chars().take(90).collect();
            let error = render(&source, json!({})).expect_err(&start).to_string();
            assert!(
                error.starts_with("m/chat_template.jinja: ") && error.contains(message),
                "{}: {error}",
                &source[..100]
            );
        }
    }

    #[test]
    fn what_costs_no_fuel_costs_patience() {
        // Comparing these takes 2^24 steps, and one unit of fuel.
        let twice = "{% for i in range(24) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}";
        let source = format!("{{% set ns = namespace(x=[1], y=[1]) %}}{twice}{{{{ ns.x == ns.y }}}}");
        let mut template = ChatTemplate::new("a", &source).unwrap();
        template.patience = Duration::from_millis(1);
        let error = template.render(&[], true, &Map::new()).unwrap_err();
        let text = "a: the template does not come to an end (while rendering the chat template); give another";
        assert!(error.kind() == Kind::Unsupported && error.to_string().starts_with(text), "{error}");
    }

    #[test]
    fn long_conversations_fit() {
        let long: Vec<Message> =
            (0..20_000).map(|i| Message::new(if i % 2 == 0 { "user" } else { "assistant" }, "x".repeat(500))).collect();
        for case in ["mistral-inst.jinja", "qwen3-think.jinja", "chatml-default-system.jinja"] {
            let template = ChatTemplate::new(case, &fs::read_to_string(goldens().join(case)).unwrap()).unwrap();
            let template = template.with_variables(tokens(&Some("<s>".into()), &Some("</s>".into())));
            assert!(template.render(&long, true, &Map::new()).unwrap().len() > 10_000_000);
        }
    }

    #[test]
    fn damaged_templates_do_not_panic() {
        let cases = cases();
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut below = |n: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % n.max(1) as u64) as usize
        };
        let (mut accepted, mut rendered) = (0, 0);
        for round in 0..3000 {
            let case = &cases[round % cases.len()];
            let mut text: Vec<char> = fs::read_to_string(goldens().join(&case.template)).unwrap().chars().collect();
            for _ in 0..=below(3) {
                let at = below(text.len());
                let end = (at + below(30)).min(text.len());
                match below(5) {
                    0 => drop(text.drain(at..end)),
                    1 => text = [&text[..end], &text[at..]].concat(),
                    2 if at < text.len() => {
                        text[at] = ['{', '}', '%', '\'', '(', ')', '|', '~', '-', ' ', '0', 'x'][below(12)]
                    }
                    3 => text.truncate(at),
                    _ => text[at..end].reverse(),
                }
            }
            let source: String = text.into_iter().collect();
            let Ok(template) = ChatTemplate::new("a", &source) else { continue };
            accepted += 1;
            rendered += usize::from(template.render(&case.messages, true, &case.variables).is_ok());
        }
        assert!((300..2700).contains(&accepted) && rendered > 100, "{accepted} of 3000, {rendered} rendered");
    }
}
