//! Task files to records.
//!
//! A file has a JSON object a line. A task of no name here has its prompts written out:
//!
//! | field | |
//! | --- | --- |
//! | `context` | what stands in front of each choice, without the space between them |
//! | `choices` | texts |
//! | `gold` | the index of the right one, from 0 |
//! | `contexts`, `continuation` | in place of `context` and `choices`: one continuation behind several contexts |
//! | `description` | optional: what stands once in front of everything, solved records included |
//! | `id` | optional: a name for messages and samples |
//!
//! A file of a known task ([`Task`]) has the fields that its authors or the Hugging Face hub gave it (MMLU also as CSV,
//! RTE also as TSV), or where these are a question and answers, `question`, `choices` and `gold`; any known task can be
//! written out, too. The prompts are those of lm-evaluation-harness 0.4.13.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};

use super::python::{capitalize, is_space};
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::router::{named, no_choice};

named! {
    /// A task whose prompts are known.
    Task {
        ArcChallenge = "arc_challenge",
        ArcEasy = "arc_easy",
        BoolQ = "boolq",
        HellaSwag = "hellaswag",
        Mmlu = "mmlu",
        OpenBookQa = "openbookqa",
        Piqa = "piqa",
        Rte = "rte",
        WinoGrande = "winogrande",
    }
}

/// A question and its answers, as the model reads them.
///
/// ```
/// use mindskip::eval::{Ask, Record};
///
/// let contexts = vec!["Tom fed the dog, as the dog".into(), "Tom fed the dog, as Tom".into()];
/// let ask = Ask::Contexts { contexts, continuation: "was hungry.".into() };
/// let requests = Record { id: None, description: String::new(), ask, gold: 0 }.requests("");
/// assert_eq!(requests[1].context, "Tom fed the dog, as Tom");
/// assert_eq!(requests[1].continuation, " was hungry.");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// A name for messages and samples.
    pub id: Option<String>,
    /// Stands once in front of everything.
    pub description: String,
    pub ask: Ask,
    /// The index of what is right.
    pub gold: usize,
}

/// What is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Several texts behind a context.
    Choices { context: String, choices: Vec<String> },
    /// A text behind several contexts.
    Contexts { contexts: Vec<String>, continuation: String },
}

impl Task {
    /// By the name of a file: `piqa.jsonl`.
    ///
    /// ```
    /// use std::path::Path;
    ///
    /// use mindskip::eval::Task;
    ///
    /// assert_eq!(Task::of(Path::new("data/piqa.jsonl")), Some(Task::Piqa));
    /// assert!(Task::Piqa.is_drawn_with_spare() && !Task::Mmlu.is_drawn_with_spare());
    /// ```
    pub fn of(path: &Path) -> Option<Task> {
        path.file_stem()?.to_str()?.parse().ok()
    }

    /// Whether the harness draws one shot more than it needs, also from records that the question is not among: it does so
    /// for tasks without a test split.
    pub fn is_drawn_with_spare(self) -> bool {
        matches!(self, Task::BoolQ | Task::HellaSwag | Task::Piqa | Task::Rte | Task::WinoGrande)
    }

    /// Whether the harness reports accuracy normalised by length.
    pub(crate) fn has_norm(self) -> bool {
        matches!(self, Task::ArcChallenge | Task::ArcEasy | Task::HellaSwag | Task::OpenBookQa | Task::Piqa)
    }
}

/// Reads a file; its records are those of a task, or written out.
///
/// Errors: Io; Format, naming the line and what is missing there; Argument when there are no records.
///
/// ```
/// use mindskip::eval::{Ask, Task, task};
///
/// let folder = tempfile::tempdir().unwrap();
/// let path = folder.path().join("piqa.jsonl");
/// let line = r#"{"goal": "Dry a dog", "sol1": "Use a towel", "sol2": "Use soup", "label": 0}"#;
/// std::fs::write(&path, line).unwrap();
/// let records = task::read(&path, Some(Task::Piqa))?;
/// assert!(matches!(&records[0].ask, Ask::Choices { context, .. } if context == "Question: Dry a dog\nAnswer:"));
/// assert_eq!(records[0].gold, 0);
/// assert!(task::read(&path, None).is_err(), "its prompts are not written out");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub fn read(path: &Path, task: Option<Task>) -> Result<Vec<Record>> {
    let bytes = files::read(path)?;
    let mut rows = rows(path, &bytes).map_err(|e| e.at(path))?;
    if task == Some(Task::Piqa) {
        add_labels(path, &mut rows)?;
    }
    if rows.is_empty() {
        return Err(Error::new(Kind::Argument, "no records").at(path).action("give a file with a JSON object a line"));
    }
    let record = |(line, row): (usize, Value)| record(&row, task).map_err(|e| e.on(line).at(path));
    rows.into_iter().map(record).collect()
}

/// What is wrong with a record.
struct Wrong(String);

impl Wrong {
    fn on(self, line: usize) -> Error {
        Error::new(Kind::Format, format!("line {line}: {}", self.0))
            .action("name the task, as in piqa=FILE, and see docs/quality.md for the fields of a record")
    }
}

/// The objects of a file, and their lines.
fn rows(path: &Path, bytes: &[u8]) -> Result<Vec<(usize, Value)>> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let mut reader = csv::ReaderBuilder::new();
    match extension {
        // MMLU: no header, and the subject is in the name.
        "csv" => reader.has_headers(false).flexible(true),
        // GLUE: quotes are ordinary characters.
        "tsv" => reader.delimiter(b'\t').quoting(false),
        _ => return lines(bytes),
    };
    let mut reader = reader.from_reader(bytes);
    let broken = |e: csv::Error| {
        let line = e.position().map_or(1, csv::Position::line);
        Error::new(Kind::Format, format!("line {line}: {e}")).action("give the file as its authors published it")
    };
    let headers: Vec<String> = match extension {
        "csv" => ["question", "A", "B", "C", "D", "answer"].map(String::from).to_vec(),
        _ => reader.headers().map_err(broken)?.iter().map(String::from).collect(),
    };
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let subject = ["_test", "_val", "_dev"].iter().find_map(|split| stem.strip_suffix(split)).unwrap_or(stem);
    let row = |record: csv::Result<csv::StringRecord>| {
        let record = record.map_err(broken)?;
        let cells = headers.iter().zip(&record).map(|(name, cell)| (name.clone(), Value::from(cell)));
        let named = (extension == "csv").then(|| ("subject".to_string(), Value::from(subject)));
        let line = record.position().map_or(0, csv::Position::line);
        Ok((line as usize, Value::Object(cells.chain(named).collect())))
    };
    reader.records().map(row).collect()
}

fn lines(bytes: &[u8]) -> Result<Vec<(usize, Value)>> {
    let lines = (1..).zip(bytes.split(|&b| b == b'\n')).filter(|(_, line)| !line.trim_ascii().is_empty());
    let parse = |(number, line): (usize, &[u8])| match serde_json::from_slice(line) {
        Ok(value) => Ok((number, value)),
        Err(e) => Err(Error::new(Kind::Format, format!("line {number}: {e}")).action("give one JSON object a line")),
    };
    lines.map(parse).collect()
}

/// PIQA's authors keep the labels of `valid.jsonl` in `valid-labels.lst`.
fn add_labels(path: &Path, rows: &mut [(usize, Value)]) -> Result<()> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let Some(bytes) = files::read_if_exists(&path.with_file_name(format!("{stem}-labels.lst")))? else { return Ok(()) };
    let labels = String::from_utf8_lossy(&bytes);
    let count = labels.lines().count();
    if count != rows.len() {
        let cause = format!("{count} labels in {stem}-labels.lst for {} records", rows.len());
        return Err(Error::new(Kind::Format, cause).at(path).action("take both files from the same place"));
    }
    for ((_, row), label) in rows.iter_mut().zip(labels.lines()) {
        if let Value::Object(row) = row {
            row.entry("label").or_insert_with(|| label.trim().into());
        }
    }
    Ok(())
}

/// The fields of an object.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a Map<String, Value>);

type Read<T> = std::result::Result<T, Wrong>;

fn wrong<T>(cause: String) -> Read<T> {
    Err(Wrong(cause))
}

impl<'a> Fields<'a> {
    fn of(value: &'a Value) -> Read<Fields<'a>> {
        value.as_object().map(Fields).ok_or_else(|| Wrong("not a JSON object".into()))
    }

    fn has(self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The first of some fields that is there.
    fn any(self, names: &[&str]) -> Read<(String, &'a Value)> {
        let found = names.iter().find_map(|name| Some((name.to_string(), self.0.get(*name)?)));
        found.ok_or_else(|| Wrong(format!("no `{}`", names.join("`, nor `"))))
    }

    fn text(self, names: &[&str]) -> Read<&'a str> {
        let (name, value) = self.any(names)?;
        value.as_str().ok_or_else(|| Wrong(format!("`{name}` is not a text")))
    }

    fn texts(self, name: &str) -> Read<Vec<String>> {
        let (_, value) = self.any(&[name])?;
        let texts = value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(String::from)).collect());
        texts.ok_or_else(|| Wrong(format!("`{name}` is not a list of texts")))
    }

    /// An index among `n`: a number, one as a text, true or false, or one of `labels`, whose i-th is i.
    fn index(self, names: &[&str], n: usize, labels: &[String]) -> Read<usize> {
        let (name, value) = self.any(names)?;
        let index = match value {
            Value::Bool(value) if n == 2 && labels.is_empty() => Some(usize::from(*value)),
            // Where choices are numbered, a number is one of their labels; elsewhere it counts from 0.
            Value::Number(number) if labels.iter().any(|label| label.parse::<u64>().is_ok()) => {
                labels.iter().position(|label| *label == number.to_string())
            }
            Value::Number(number) => number.as_u64().and_then(|index| index.try_into().ok()),
            Value::String(text) => {
                let text = text.trim();
                labels
                    .iter()
                    .position(|label| label == text)
                    .or_else(|| text.parse().ok().filter(|_| labels.is_empty()))
            }
            _ => None,
        };
        match index.filter(|&index| index < n) {
            Some(index) => Ok(index),
            None if labels.is_empty() => wrong(format!("`{name}` is {value}, there are {n} choices, from 0")),
            None => wrong(format!("`{name}` is {value}, the choices are {}", labels.join(", "))),
        }
    }
}

/// A record of a task, or written out.
fn record(row: &Value, task: Option<Task>) -> Read<Record> {
    let fields = Fields::of(row)?;
    let id = match fields.0.get("id") {
        Some(Value::String(id)) => Some(id.clone()),
        Some(Value::Number(id)) => Some(id.to_string()),
        _ => None,
    };
    let mut description = String::new();
    let (ask, gold) = match task {
        Some(task) if !fields.has("context") && !fields.has("contexts") => {
            if task == Task::Mmlu && fields.has("subject") {
                let subject = fields.text(&["subject"])?.replace('_', " ");
                description =
                    format!("The following are multiple choice questions (with answers) about {subject}.\n\n");
            }
            known(fields, task)?
        }
        _ => {
            if fields.has("description") {
                description = fields.text(&["description"])?.into();
            }
            written_out(fields)?
        }
    };
    let (n, empty) = match &ask {
        Ask::Choices { context, choices } => {
            (choices.len(), context.is_empty() && choices.iter().any(String::is_empty))
        }
        Ask::Contexts { contexts, continuation } => (contexts.len(), continuation.is_empty()),
    };
    match n {
        0 => wrong("there are no choices".into()),
        1 => wrong("there is one choice, which is no question".into()),
        _ if empty => wrong("there is nothing to score: an empty text".into()),
        _ => Ok(Record { id, description, ask, gold }),
    }
}

fn written_out(fields: Fields) -> Read<(Ask, usize)> {
    if fields.has("contexts") {
        let (contexts, continuation) = (fields.texts("contexts")?, fields.text(&["continuation"])?.into());
        let gold = fields.index(&["gold"], contexts.len(), &[])?;
        return Ok((Ask::Contexts { contexts, continuation }, gold));
    }
    let (context, choices) = (fields.text(&["context"])?.into(), fields.texts("choices")?);
    let gold = fields.index(&["gold"], choices.len(), &[])?;
    Ok((Ask::Choices { context, choices }, gold))
}

fn known(fields: Fields, task: Task) -> Read<(Ask, usize)> {
    let (context, choices, gold) = match task {
        Task::ArcChallenge | Task::ArcEasy | Task::OpenBookQa => {
            let (question, choices, gold) = labelled(fields)?;
            let context = match task {
                Task::OpenBookQa => question,
                _ => format!("Question: {question}\nAnswer:"),
            };
            (context, choices, gold)
        }
        Task::BoolQ => {
            let (passage, question) = (fields.text(&["passage"])?, fields.text(&["question"])?);
            let choices = vec!["no".into(), "yes".into()];
            let gold = fields.index(&["label", "answer", "gold"], 2, &[])?;
            (format!("{passage}\nQuestion: {question}?\nAnswer:"), choices, gold)
        }
        Task::HellaSwag => {
            let (activity, a) = (fields.text(&["activity_label"])?, fields.text(&["ctx_a"])?);
            let b = capitalize(fields.text(&["ctx_b"])?);
            let choices: Vec<String> = fields.texts("endings")?.iter().map(|ending| clean(ending)).collect();
            let gold = fields.index(&["label", "gold"], choices.len(), &[])?;
            (clean(&format!("{activity}: {a} {b}")), choices, gold)
        }
        Task::Mmlu => {
            let letters = ["A", "B", "C", "D"];
            let options = match fields.has("choices") {
                true => fields.texts("choices")?,
                false => letters.iter().map(|name| fields.text(&[name]).map(String::from)).collect::<Read<_>>()?,
            };
            if options.len() != letters.len() {
                return wrong(format!("{} choices, MMLU has {}", options.len(), letters.len()));
            }
            let mut context = fields.text(&["question"])?.trim_matches(is_space).to_string();
            for (letter, option) in letters.iter().zip(&options) {
                context += &format!("\n{letter}. {option}");
            }
            let choices = letters.map(String::from).to_vec();
            let gold = fields.index(&["answer", "gold"], 4, &choices)?;
            (context + "\nAnswer:", choices, gold)
        }
        Task::Piqa => {
            let goal = fields.text(&["goal", "question"])?;
            let choices = pair(fields, ["sol1", "sol2"])?;
            let gold = fields.index(&["label", "gold"], choices.len(), &[])?;
            (format!("Question: {goal}\nAnswer:"), choices, gold)
        }
        Task::Rte => {
            let (one, two) = (fields.text(&["sentence1", "premise"])?, fields.text(&["sentence2", "hypothesis"])?);
            let labels = ["entailment", "not_entailment"].map(String::from);
            let labels = if fields.any(&["label", "gold"])?.1.is_string() { &labels[..] } else { &[] };
            let gold = fields.index(&["label", "gold"], 2, labels)?;
            (format!("{one}\nQuestion: {two} True or False?\nAnswer:"), vec!["True".into(), "False".into()], gold)
        }
        Task::WinoGrande => {
            let sentence = fields.text(&["sentence", "question"])?;
            let Some((before, after)) = sentence.split_once('_') else {
                return wrong("there is no `_` in the sentence".into());
            };
            let options = pair(fields, ["option1", "option2"])?;
            let numbers: Vec<String> = (1..=options.len()).map(|number| number.to_string()).collect();
            let labels = if fields.has("answer") { &numbers[..] } else { &[] };
            let gold = fields.index(&["answer", "gold"], options.len(), labels)?;
            let contexts = options.iter().map(|option| format!("{before}{option}")).collect();
            return Ok((Ask::Contexts { contexts, continuation: after.trim_matches(is_space).into() }, gold));
        }
    };
    Ok((Ask::Choices { context, choices }, gold))
}

/// The two fields of a pair, or `choices`.
fn pair(fields: Fields, names: [&str; 2]) -> Read<Vec<String>> {
    if fields.has("choices") {
        return fields.texts("choices");
    }
    names.iter().map(|name| fields.text(&[name]).map(String::from)).collect()
}

/// Question, choices and the right one of ARC and OpenBookQA, whose choices have labels: as their authors nest them, as the
/// hub does, or as a list with an index.
fn labelled(fields: Fields) -> Read<(String, Vec<String>, usize)> {
    let (name, question) = fields.any(&["question", "question_stem"])?;
    let nested = question.is_object().then(|| Fields::of(question)).transpose()?;
    let (texts, labels) = match (nested, fields.0.get("choices")) {
        (Some(question), _) => {
            let (_, list) = question.any(&["choices"])?;
            let choices = list.as_array().ok_or_else(|| Wrong("`choices` is not a list".into()))?;
            let part = |choice, name| Fields::of(choice)?.text(&[name]).map(String::from);
            let labels = choices.iter().map(|choice| part(choice, "label")).collect::<Read<Vec<_>>>()?;
            (choices.iter().map(|choice| part(choice, "text")).collect::<Read<Vec<_>>>()?, labels)
        }
        (None, Some(choices @ Value::Object(_))) => {
            let choices = Fields::of(choices)?;
            (choices.texts("text")?, choices.texts("label")?)
        }
        _ => (fields.texts("choices")?, Vec::new()),
    };
    let stem = match nested {
        Some(question) => question.text(&["stem"])?,
        None => fields.text(&[&name])?,
    };
    let gold = fields.index(&["answerKey", "gold"], texts.len(), &labels)?;
    Ok((stem.into(), texts, gold))
}

/// HellaSwag's text without what the conversion of WikiHow left in it.
fn clean(text: &str) -> String {
    let text = text.trim_matches(is_space).replace(" [title]", ". ");
    // What stands in brackets on one line goes.
    let (mut kept, mut rest) = (String::new(), &text[..]);
    while let Some(open) = rest.find('[') {
        kept += &rest[..open];
        rest = &rest[open..];
        let end = rest.find(['\n', ']']).filter(|&end| rest[end..].starts_with(']'));
        let skipped = end.map_or(0, |end| end + 1);
        if skipped == 0 {
            kept.push('[');
            rest = &rest[1..];
        }
        rest = &rest[skipped..];
    }
    (kept + rest).replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Reads a file of that name with that text.
    fn open(name: &str, text: &str, task: Option<Task>) -> Result<Vec<Record>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        read(&path, task)
    }

    /// Whatever way a task is published in, it comes to the same prompt, choices and gold.
    #[track_caller]
    fn same(task: Task, files: &[(&str, &str)], context: &str, choices: &[&str], gold: usize) {
        for (name, text) in files {
            let records = open(name, text, Some(task)).unwrap();
            assert_eq!(records.len(), 1);
            let choices = choices.iter().map(|choice| choice.to_string()).collect();
            let ask = Ask::Choices { context: context.into(), choices };
            assert_eq!((&records[0].ask, records[0].gold), (&ask, gold), "{text}");
        }
    }

    #[test]
    fn arc_and_openbookqa_in_three_forms() {
        let own = r#"{"id": "M_1", "question": {"stem": "Why?", "choices": [{"text": "As.", "label": "A"},
            {"text": "So.", "label": "B"}]}, "answerKey": "B"}"#
            .replace('\n', " ");
        let hub = r#"{"id": "M_1", "question": "Why?", "choices": {"text": ["As.", "So."], "label": ["1", "2"]}, "answerKey": "2"}"#;
        let short = r#"{"id": "M_1", "question": "Why?", "choices": ["As.", "So."], "gold": 1}"#;
        let files = [("a.jsonl", &own[..]), ("a.jsonl", hub), ("a.jsonl", short)];
        same(Task::ArcChallenge, &files, "Question: Why?\nAnswer:", &["As.", "So."], 1);
        let stem = hub.replace("\"question\"", "\"question_stem\"").replace("\"2\"}", "\" 2\"}");
        same(Task::OpenBookQa, &[files[0], ("o.jsonl", &stem[..]), files[2]], "Why?", &["As.", "So."], 1);
        assert_eq!(open("a.jsonl", hub, Some(Task::ArcEasy)).unwrap()[0].id.as_deref(), Some("M_1"));
    }

    #[test]
    fn boolq_and_rte_in_the_forms_of_glue_and_superglue() {
        let own = r#"{"question": "is it so", "title": "It", "answer": true, "passage": "It is."}"#;
        let glue = r#"{"question": "is it so", "passage": "It is.", "idx": 3, "label": 1}"#;
        let context = "It is.\nQuestion: is it so?\nAnswer:";
        same(Task::BoolQ, &[("b.jsonl", own), ("b.jsonl", glue)], context, &["no", "yes"], 1);

        let hub = r#"{"sentence1": "It \"is\".", "sentence2": "It was.", "label": 1, "idx": 0}"#;
        let superglue = r#"{"premise": "It \"is\".", "hypothesis": "It was.", "label": "not_entailment", "idx": 0}"#;
        let tsv = "index\tsentence1\tsentence2\tlabel\n0\tIt \"is\".\tIt was.\tnot_entailment\n";
        let context = "It \"is\".\nQuestion: It was. True or False?\nAnswer:";
        let files = [("r.jsonl", hub), ("r.jsonl", superglue), ("dev.tsv", tsv)];
        same(Task::Rte, &files, context, &["True", "False"], 1);
    }

    #[test]
    fn hellaswag_is_cleaned() {
        let own = r#"{"ind": 4, "activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix.",
            "ctx_b": "THEN he", "ctx": "…", "split": "val", "endings": ["eats  it [step].", " sleeps [x"], "label": 1}"#
            .replace('\n', " ");
        let hub = own.replace("\"label\": 1", "\"label\": \"1\"");
        let files = [("h.jsonl", &own[..]), ("h.jsonl", &hub)];
        let context = "Baking: How to bake. Mix. Then he";
        same(Task::HellaSwag, &files, context, &["eats it .", "sleeps [x"], 1);
        // As Python's re.sub(r"\[.*?\]", "", text) has it.
        for (text, cleaned) in [("a [b [c] d] e", "a  d] e".replace("  ", " ")), ("[a\nb] [c]", "[a\nb] ".into())] {
            assert_eq!(clean(text), cleaned);
        }
    }

    #[test]
    fn mmlu_of_the_hub_and_of_its_authors() {
        let hub =
            r#"{"question": " Which?\n", "subject": "high_school_x", "choices": ["a", "b", "c", "d"], "answer": 2}"#;
        let csv = "\"Which?\",a,b,c,d,C\n";
        let context = "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer:";
        let files = [("m.jsonl", hub), ("high_school_x_test.csv", csv)];
        same(Task::Mmlu, &files, context, &["A", "B", "C", "D"], 2);
        for (name, text) in files {
            let description = &open(name, text, Some(Task::Mmlu)).unwrap()[0].description;
            let wanted = "The following are multiple choice questions (with answers) about high school x.\n\n";
            assert_eq!(description, wanted);
        }
        let quoted = "\"A \"\"q\"\",\nof two lines\",1,2,3,4,A\n";
        let Ask::Choices { context, .. } = &open("x_dev.csv", quoted, Some(Task::Mmlu)).unwrap()[0].ask else {
            panic!()
        };
        assert!(context.starts_with("A \"q\",\nof two lines\nA. 1"), "{context}");
    }

    #[test]
    fn piqa_with_its_labels_within_or_beside() {
        let hub = r#"{"goal": "To go", "sol1": "run", "sol2": "walk", "label": 1}"#;
        let short = r#"{"id": "p", "question": "To go", "choices": ["run", "walk"], "gold": 1}"#;
        let files = [("p.jsonl", hub), ("p.jsonl", short)];
        same(Task::Piqa, &files, "Question: To go\nAnswer:", &["run", "walk"], 1);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("valid.jsonl");
        fs::write(&path, format!("{0}\n{0}\n", r#"{"goal": "To go", "sol1": "run", "sol2": "walk"}"#)).unwrap();
        let error = read(&path, Some(Task::Piqa)).unwrap_err().to_string();
        assert!(error.contains("line 1: no `label`, nor `gold`"), "{error}");
        fs::write(dir.path().join("valid-labels.lst"), "1\n0\n").unwrap();
        let gold: Vec<usize> = read(&path, Some(Task::Piqa)).unwrap().iter().map(|record| record.gold).collect();
        assert_eq!(gold, [1, 0]);
    }

    #[test]
    fn winogrande_has_a_context_for_each_option() {
        let own =
            r#"{"qID": "3", "sentence": "Ann saw Bo as _ left. ", "option1": "Ann", "option2": "Bo", "answer": "2"}"#;
        let short = r#"{"question": "Ann saw Bo as _ left.", "choices": ["Ann", "Bo"], "gold": 1}"#;
        for text in [own, short] {
            let record = &open("w.jsonl", text, Some(Task::WinoGrande)).unwrap()[0];
            let contexts = vec!["Ann saw Bo as Ann".to_string(), "Ann saw Bo as Bo".into()];
            assert_eq!((&record.ask, record.gold), (&Ask::Contexts { contexts, continuation: "left.".into() }, 1));
        }
    }

    #[test]
    fn any_task_can_be_written_out() {
        let text = r#"{"id": 7, "description": "D\n", "context": "C", "choices": ["a", "b"], "gold": 0}
            {"contexts": ["a", "b", "c"], "continuation": "d", "gold": 2}"#;
        for task in [None, Some(Task::Mmlu)] {
            let records = open("any.jsonl", text, task).unwrap();
            assert_eq!((records[0].id.as_deref(), &records[0].description[..]), (Some("7"), "D\n"));
            assert_eq!((records.len(), records[1].gold), (2, 2));
        }
    }

    #[test]
    fn broken_files_are_refused() {
        let fine = r#"{"context": "c", "choices": ["a", "b"], "gold": 1}"#;
        let piqa = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": "#;
        for (text, task, message) in [
            ("", None, "no records; give"),
            (" \n\n", Some(Task::Piqa), "no records"),
            ("{\"context\"", None, "line 1: EOF"),
            ("3", None, "line 1: not a JSON object"),
            (r#"{"question": "q", "choices": ["a", "b"], "gold": 1}"#, None, "line 1: no `context`; name the task"),
            (r#"{"context": "c", "gold": 1}"#, None, "line 1: no `choices`"),
            (r#"{"context": "c", "choices": [], "gold": 0}"#, None, "line 1: `gold` is 0, there are 0 choices"),
            (r#"{"context": "c", "choices": ["a"], "gold": 0}"#, None, "there is one choice"),
            (r#"{"context": "c", "choices": ["a", 3], "gold": 0}"#, None, "`choices` is not a list of texts"),
            (r#"{"context": "c", "choices": ["a", "b"]}"#, None, "no `gold`"),
            (r#"{"context": "c", "choices": ["a", "b"], "gold": 2}"#, None, "`gold` is 2, there are 2 choices"),
            (r#"{"context": "c", "choices": ["a", "b"], "gold": -1}"#, None, "`gold` is -1"),
            (r#"{"context": 1, "choices": ["a", "b"], "gold": 1}"#, None, "`context` is not a text"),
            (r#"{"context": "", "choices": ["a", ""], "gold": 1}"#, None, "nothing to score"),
            (r#"{"contexts": ["c", "d"], "gold": 1}"#, None, "no `continuation`"),
            (&format!("{piqa}-1}}"), Some(Task::Piqa), "`label` is -1"),
            (&format!("{piqa}null}}"), Some(Task::Piqa), "`label` is null"),
            (r#"{"question": "No blank", "choices": ["a", "b"], "gold": 1}"#, Some(Task::WinoGrande), "no `_`"),
            (r#"{"question": "q", "choices": ["a", "b"], "answer": 1}"#, Some(Task::Mmlu), "2 choices, MMLU has 4"),
            (
                r#"{"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "E"}"#,
                Some(Task::ArcEasy),
                "`answerKey` is \"E\", the choices are A, B",
            ),
            (r#"{"premise": "p", "hypothesis": "h", "label": "maybe"}"#, Some(Task::Rte), "the choices are entailment"),
            (
                r#"{"question": {"stem": "q", "choices": "no"}, "answerKey": "A"}"#,
                Some(Task::ArcEasy),
                "`choices` is not a list",
            ),
        ] {
            let error = open("t.jsonl", text, task).unwrap_err().to_string();
            assert!(error.contains("t.jsonl: ") && error.contains(message) && error.contains("; "), "{text}: {error}");
            // The line is that of the file.
            if !text.trim().is_empty() && task.is_none() {
                let error = open("t.jsonl", &format!("\n{fine}\n\n{text}"), None).unwrap_err().to_string();
                assert!(error.contains("line 4: "), "{error}");
            }
        }
        let error = open("dev.tsv", "index\tsentence1\n0\ta\tb\n", Some(Task::Rte)).unwrap_err().to_string();
        assert!(error.contains("dev.tsv: line 2: "), "{error}");
        let error = open("x_test.csv", "q,a,b\n", Some(Task::Mmlu)).unwrap_err().to_string();
        assert!(error.contains("line 1: no `C`"), "{error}");
    }
}
