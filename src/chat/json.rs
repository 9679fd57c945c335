//! The filter `tojson` as transformers defines it: Python's `json.dumps`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Lists within lists that are followed.
const MAX_DEPTH: usize = 128;

/// `json.dumps` with the options that transformers gives it: nothing is escaped for HTML, and characters beyond ASCII
/// only when asked for.
pub(super) fn tojson(state: &State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (positional, named): (&[Value], Kwargs) = from_args(&args)?;
    let option = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = positional.get(i).cloned().map_or_else(|| named.get(name), |value| Ok(Some(value)))?;
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ensure_ascii = option(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match option(1, "indent")? {
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(number) => Some(" ".repeat(i64::try_from(number)?.clamp(0, 100) as usize)),
        None => None,
    };
    let (between, colon) = match option(2, "separators")? {
        Some(pair) => (pair.get_item_by_index(0)?.to_string(), pair.get_item_by_index(1)?.to_string()),
        None => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let sort_keys = option(3, "sort_keys")?.is_some_and(|v| v.is_true());
    named.assert_all_used()?;
    let mut json = Writer { state, out: String::new(), ensure_ascii, sort_keys, indent, between, colon };
    json.write(value, 0)?;
    Ok(Value::from(json.out))
}

/// Writes JSON as Python does.
struct Writer<'a, 'b> {
    state: &'a State<'a, 'b>,
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    /// Of one level; `None` puts everything on one line.
    indent: Option<String>,
    between: String,
    colon: String,
}

impl Writer<'_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.state.consume_fuel(1)?;
        let fail = |text: String| Err(Error::new(ErrorKind::InvalidOperation, text));
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => write!(self.out, "{value}").expect("strings grow"),
            ValueKind::Number => self.out.push_str(&python_float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable | ValueKind::Map if depth == MAX_DEPTH => {
                return fail(format!("tojson: more than {MAX_DEPTH} lists within lists"));
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?;
                self.out.push('[');
                let mut empty = true;
                for item in items {
                    self.item(empty, depth + 1);
                    self.write(&item, depth + 1)?;
                    empty = false;
                }
                self.close(']', empty, depth);
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push('{');
                for (i, key) in keys.iter().enumerate() {
                    self.item(i == 0, depth + 1);
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default()),
                        ValueKind::Bool | ValueKind::None | ValueKind::Number => {
                            self.out.push('"');
                            self.write(key, depth)?;
                            self.out.push('"');
                        }
                        kind => return fail(format!("tojson: a key of type {kind}")),
                    }
                    self.out.push_str(&self.colon);
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.close('}', keys.is_empty(), depth);
            }
            kind => return fail(format!("tojson: a value of type {kind}")),
        }
        Ok(())
    }

    fn item(&mut self, first: bool, depth: usize) {
        if !first {
            self.out.push_str(&self.between);
        }
        self.line(depth);
    }

    fn close(&mut self, bracket: char, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        write!(self.out, "\\u{unit:04x}").expect("strings grow");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `repr` of a float: the shortest digits that give it back, as in Rust, but `1e+16` and `1e-05`.
fn python_float(x: f64) -> String {
    if !x.is_finite() {
        return if x.is_nan() {
            "NaN"
        } else if x > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .into();
    }
    let text = format!("{x:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let exponent: i32 = exponent.parse().unwrap_or_default();
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::render;
    use serde_json::json;

    /// What Python's json.dumps gives.
    #[test]
    fn json_is_that_of_python() {
        let x = json!({
            "b": [1, 2.5, 1e16, 1e-5, 0.0001, -0.0, 1e300, 123456789012345680.0, [], {}],
            "a": {"ü": "é\"\\\n\t\u{1}\u{7f}<&>'🙂", "1": null}, "z": true,
        });
        for (filter, expected) in [
            (
                "x | tojson",
                r#"{"b": [1, 2.5, 1e+16, 1e-05, 0.0001, -0.0, 1e+300, 1.2345678901234568e+17, [], {}], "a": {"ü": "é\"\\\n\t\u0001<&>'🙂", "1": null}, "z": true}"#,
            ),
            (
                "x | tojson(ensure_ascii=true, sort_keys=true)",
                r#"{"a": {"1": null, "\u00fc": "\u00e9\"\\\n\t\u0001\u007f<&>'\ud83d\ude42"}, "b": [1, 2.5, 1e+16, 1e-05, 0.0001, -0.0, 1e+300, 1.2345678901234568e+17, [], {}], "z": true}"#,
            ),
            ("x.a | tojson(separators=(',', ':'))", "{\"ü\":\"é\\\"\\\\\\n\\t\\u0001\u{7f}<&>'🙂\",\"1\":null}"),
            (
                "{'p': [1, {}], 'q': {'r': []}} | tojson(indent=2)",
                "{\n  \"p\": [\n    1,\n    {}\n  ],\n  \"q\": {\n    \"r\": []\n  }\n}",
            ),
            ("[1, 2] | tojson(indent='\t')", "[\n\t1,\n\t2\n]"),
            ("[1] | tojson(indent=0)", "[\n1\n]"),
            ("{1: 2, none: 4, 1.5: 5} | tojson", r#"{"1": 2, "null": 4, "1.5": 5}"#),
            ("{'a': 1}.items() | list | tojson", r#"[["a", 1]]"#),
            ("'a' | tojson(false, 2)", r#""a""#),
        ] {
            let expected = expected.replace("\\u0001<", "\\u0001\u{7f}<");
            assert_eq!(render(&format!("{{{{ {filter} }}}}"), json!({"x": x})).unwrap(), expected, "{filter}");
        }
        assert!(
            render("{{ nothing | tojson }}", json!({}))
                .unwrap_err()
                .to_string()
                .contains("tojson: a value of type undefined")
        );
        assert!(render("{{ 1 | tojson(foo=1) }}", json!({})).unwrap_err().to_string().contains("foo"));
    }
}
