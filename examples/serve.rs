//! Prompts from standard input, one a line, answered by one engine as they come; each answer is printed when it is whole:
//! `printf 'Tom had\nThe dog\nOne day\n' | cargo run --release --example serve`.

use std::collections::HashMap;
use std::sync::mpsc::{TryRecvError, channel};
use std::{io, thread};

use mindskip::Result;
use mindskip::batch::{Batch, Event, Request};
use mindskip::bundle::Bundle;
use mindskip::engine::{Engine, Options};
use mindskip::model::Routing;

fn main() -> Result<()> {
    let bundle = Bundle::embedded()?;
    let (tokenizer, eos) = (bundle.tokenizer()?, bundle.eos().to_vec());
    let routing = bundle.routers.clone().map(Routing::routers);
    // Eight at a time, whose K/V take the memory of three whole contexts.
    let options = Options { batch: 8, context: Some(256), kv_tokens: Some(768), ..Options::default() };
    let mut batch = Batch::new(Engine::new(bundle.config, bundle.weights, routing, &options)?, &tokenizer);

    let (send, lines) = channel();
    thread::spawn(move || io::stdin().lines().map_while(io::Result::ok).try_for_each(|line| send.send(line)));
    let (mut asked, mut open) = (HashMap::new(), true);
    while open || !batch.is_idle() {
        // With nothing to do it waits for a line; else it takes what has come.
        let line =
            if batch.is_idle() { lines.recv().map_err(|_| TryRecvError::Disconnected) } else { lines.try_recv() };
        match line {
            Ok(line) => {
                let request = Request::new(tokenizer.encode(&line, true)?)?;
                match batch.submit(Request { eos: eos.clone(), max_tokens: 60, ..request }) {
                    Ok(id) => drop(asked.insert(id, line)),
                    Err(error) => eprintln!("{line}: {error}"),
                }
                continue;
            }
            Err(TryRecvError::Disconnected) => open = false,
            Err(TryRecvError::Empty) => {}
        }
        for event in batch.step()? {
            match event {
                Event::Text(..) => {}
                Event::Done(id, answer) => println!("{}{}\n", asked.remove(&id).unwrap_or_default(), answer.text),
                Event::Failed(id, error) => eprintln!("{}: {error}", asked.remove(&id).unwrap_or_default()),
            }
        }
    }
    Ok(())
}
