//! The state of a run on disk: a safetensors file with the routers and AdamW's means, the rest in its metadata.

use std::path::Path;

use super::train::TrainState;
use crate::error::{Error, Kind, Result};
use crate::files;
use crate::weights::{Weights, to_safetensors};

const FORMAT: &str = "mindskip-tuning-1";
const TENSORS: [&str; 3] = ["routers", "means", "squares"];

pub fn save(state: &TrainState, identity: &str, path: &Path) -> Result<()> {
    let tensors = TENSORS.map(String::from).into_iter().zip([&state.routers[..], &state.means, &state.squares]);
    let metadata = [
        ("format", FORMAT.to_string()),
        ("run", identity.to_string()),
        ("step", state.step.to_string()),
        ("lambda", state.lambda.to_bits().to_string()),
    ];
    let bytes = to_safetensors(tensors, &metadata.map(|(key, value)| (key.to_string(), value)).into());
    files::write_atomically(path, |file| file.write_all(&bytes))
}

/// Errors: Io; Format; Mismatch when it is of another run.
pub fn open(path: &Path, identity: &str, values: usize) -> Result<TrainState> {
    let weights = Weights::from_parts(vec![(path.into(), files::map(path)?)])?;
    let metadata = weights.metadata();
    let get = |key: &str| metadata.get(key).map_or("", String::as_str);
    let broken =
        || Error::new(Kind::Format, "not a checkpoint of a tuning run").at(path).action("start without --resume");
    if get("format") != FORMAT {
        return Err(broken());
    }
    if get("run") != identity {
        let cause = format!("a checkpoint of another run: {}, not {identity}", get("run"));
        return Err(Error::new(Kind::Mismatch, cause)
            .at(path)
            .action("resume with the same arguments, or start without --resume"));
    }
    let read = |name: &str| weights.tensor(name, 1, values).map(|tensor| tensor.to_f32());
    let lambda: u64 = get("lambda").parse().map_err(|_| broken())?;
    let state = TrainState {
        step: get("step").parse().map_err(|_| broken())?,
        routers: read(TENSORS[0])?,
        means: read(TENSORS[1])?,
        squares: read(TENSORS[2])?,
        lambda: f64::from_bits(lambda),
    };
    let values = [&state.routers, &state.means, &state.squares];
    if !state.lambda.is_finite() || values.into_iter().flatten().any(|value| !value.is_finite()) {
        return Err(broken());
    }
    Ok(state)
}
