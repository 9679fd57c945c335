//! Models and routers.

use std::ffi::c_char;

use mindskip::bundle::Bundle;
use mindskip::chat::{ChatTemplate, Message};
use mindskip::model::Routing;
use mindskip::router::{LayerSpec, Overrides, RouterSet};
use mindskip::tokenizer::Tokenizer;

use crate::args::{Buffer, Out, grown, list, put, some_text, text, word};
use crate::failure::{Done, Failure, entry};
use crate::handles::Table;
use crate::types::*;

pub struct Model {
    pub bundle: Bundle,
    pub tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

pub static MODELS: Table<mindskip_model, Model> = Table::new("a model", "freed");
static ROUTERS: Table<mindskip_routers, RouterSet> = Table::new("routers", "freed");

impl Model {
    fn load(name: &str) -> Done<Model> {
        let bundle = Bundle::load(name)?;
        let (tokenizer, template) = (bundle.tokenizer()?, bundle.chat_template()?);
        Ok(Model { bundle, tokenizer, template })
    }
}

/// The routing of a handle; None for NULL.
pub fn routing(routers: *mut mindskip_routers) -> Done<Option<Routing>> {
    if routers.is_null() {
        return Ok(None);
    }
    Ok(Some(Routing::routers(RouterSet::clone(&*ROUTERS.get(routers)?))))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_model_load(name: *const c_char, model: *mut *mut mindskip_model) -> mindskip_status {
    entry(|| {
        // SAFETY: the header's rule.
        let (name, out) = unsafe { (some_text("name", name)?, Out::new("model", model)?) };
        out.set(MODELS.add(Model::load(name)?));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_model_free(model: *mut mindskip_model) -> mindskip_status {
    entry(|| MODELS.free(model))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_model_get_info(
    model: *mut mindskip_model,
    info: *mut mindskip_model_info,
) -> mindskip_status {
    entry(|| {
        let model = MODELS.get(model)?;
        let (c, weights, eos) = (&model.bundle.config, &model.bundle.weights, model.bundle.eos());
        let value = mindskip_model_info {
            size: 0,
            layers: c.layers,
            hidden: c.hidden,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            vocab: c.vocab,
            context: c.context,
            parameters: weights.parameters() as u64,
            weight_bytes: weights.bytes() as u64,
            eos: eos.as_ptr(),
            eos_count: eos.len(),
            has_routers: model.bundle.routers.is_some().into(),
            has_chat_template: model.template.is_some().into(),
        };
        // SAFETY: the header's rule.
        unsafe { put("info", info, value) }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_tokenize(
    model: *mut mindskip_model,
    text: *const c_char,
    add_special: i32,
    ids: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> mindskip_status {
    entry(|| {
        let model = MODELS.get(model)?;
        // SAFETY: the header's rule.
        let (text, out) = unsafe { (some_text("text", text)?, Buffer::new("ids", ids, capacity, length)?) };
        out.fill(&model.tokenizer.encode(text, add_special != 0)?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_detokenize(
    model: *mut mindskip_model,
    ids: *const u32,
    count: usize,
    skip_special: i32,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> mindskip_status {
    entry(|| {
        let model = MODELS.get(model)?;
        // SAFETY: the header's rule.
        let (ids, out) = unsafe { (list("ids", ids, count)?, Buffer::new("text", text, capacity, length)?) };
        out.fill_text(&model.tokenizer.decode(ids, skip_special != 0)?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_chat(
    model: *mut mindskip_model,
    messages: *const mindskip_message,
    count: usize,
    add_prompt: i32,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> mindskip_status {
    entry(|| {
        let model = MODELS.get(model)?;
        // SAFETY: the header's rule.
        let (messages, out) = unsafe {
            let messages: Done<Vec<_>> = list("messages", messages, count)?
                .iter()
                .map(|m| Ok(Message::new(some_text("role", m.role)?, some_text("content", m.content)?)))
                .collect();
            (messages?, Buffer::new("text", text, capacity, length)?)
        };
        let template = model.template.as_ref().ok_or_else(|| {
            let text = format!("{} has no chat template; give the folder of a model that has one", model.bundle.name);
            Failure::new(MINDSKIP_ERROR_UNSUPPORTED, text)
        })?;
        out.fill_text(&template.render(&messages, add_prompt != 0, &Default::default())?)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mindskip_routers_load(
    model: *mut mindskip_model,
    path: *const c_char,
    routing: *const mindskip_routing,
    routers: *mut *mut mindskip_routers,
) -> mindskip_status {
    entry(|| {
        let model = MODELS.get(model)?;
        let mut wanted = (Overrides::default(), None);
        // SAFETY: the header's rule.
        let (path, out) = unsafe {
            if !routing.is_null() {
                wanted = overrides(grown("routing", routing)?)?;
            }
            (text("path", path)?, Out::new("routers", routers)?)
        };
        out.set(ROUTERS.add(load_routers(&model, path, &wanted.0, wanted.1)?));
        Ok(())
    })
}

/// # Safety
///
/// That of [`text`], for the words.
unsafe fn overrides(routing: mindskip_routing) -> Done<(Overrides, Option<LayerSpec>)> {
    let given = |number: f32| Some(number).filter(|&number| number != 0.0);
    // SAFETY: the caller's.
    unsafe {
        let overrides = Overrides {
            granularity: word("granularity", routing.granularity)?,
            keys: word("keys", routing.keys)?,
            select: word("select", routing.select)?,
            threshold: given(routing.threshold),
            capacity: given(routing.capacity),
        };
        Ok((overrides, word("layers", routing.layers)?))
    }
}

fn load_routers(
    model: &Model,
    path: Option<&str>,
    overrides: &Overrides,
    layers: Option<LayerSpec>,
) -> Done<RouterSet> {
    let bundle = &model.bundle;
    let mut set = match path {
        Some(path) => RouterSet::open(path.as_ref())?,
        None => bundle.routers.clone().ok_or_else(|| {
            Failure::argument(format!("{} comes without routers; give the path of a router file", bundle.name))
        })?,
    };
    set.check(&bundle.config, &bundle.weights.fingerprint())?;
    set.apply(overrides)?;
    if let Some(layers) = layers {
        set.keep(&layers.resolve(bundle.config.layers)?)?;
    }
    Ok(set)
}

#[unsafe(no_mangle)]
pub extern "C" fn mindskip_routers_free(routers: *mut mindskip_routers) -> mindskip_status {
    entry(|| ROUTERS.free(routers))
}
