//! Solved records in front of the question.

use std::collections::BTreeMap;

use super::python::Random;
use super::task::{Ask, Record};
use crate::error::{Error, Kind, Result};

/// Chooses solved records for each question, among those with its description.
///
/// ```
/// use mindskip::eval::{Ask, Record, Shots};
///
/// let record = |question: &str, gold| {
///     let ask = Ask::Choices { context: question.into(), choices: vec!["yes".into(), "no".into()] };
///     Record { id: None, description: "Answer.\n\n".into(), ask, gold }
/// };
/// let solved = [record("Is grass green?", 0), record("Is snow black?", 1)];
/// let mut shots = Shots::new(&solved, 2, None, false);
/// let before = shots.before(&record("Is the sea wet?", 0))?;
/// assert_eq!(before, "Answer.\n\nIs grass green? yes\n\nIs snow black? no\n\n");
/// # Ok::<(), mindskip::Error>(())
/// ```
pub struct Shots<'a> {
    count: usize,
    pools: BTreeMap<&'a str, (Vec<&'a Record>, Option<Random>)>,
    /// A question may be in the pool: one record more is drawn, and the question itself left out.
    spare: bool,
}

impl<'a> Shots<'a> {
    /// `count` records: the first ones, as the harness takes them for MMLU, or with a seed drawn anew for each question, as
    /// it does elsewhere (with 1234). `spare`: the questions are of the pool, or the task is one for which the harness
    /// draws as if they were ([`Task::is_drawn_with_spare`](super::Task::is_drawn_with_spare)).
    pub fn new(pool: &'a [Record], count: usize, seed: Option<u32>, spare: bool) -> Shots<'a> {
        let mut pools: BTreeMap<&str, (Vec<&Record>, Option<Random>)> = BTreeMap::new();
        for record in pool {
            let of = || (Vec::new(), seed.map(Random::new));
            pools.entry(&record.description).or_insert_with(of).0.push(record);
        }
        Shots { count, pools, spare }
    }

    /// What stands in front of a question: its description and the shots. Questions are to be asked for in their order.
    ///
    /// Errors: Argument when there are too few records.
    pub fn before(&mut self, record: &Record) -> Result<String> {
        let mut text = record.description.clone();
        for shot in self.of(record)? {
            text += &shot.solved();
        }
        Ok(text)
    }

    fn of(&mut self, record: &Record) -> Result<Vec<&'a Record>> {
        let n = self.count;
        if n == 0 {
            return Ok(Vec::new());
        }
        let others =
            |pool: &[&'a Record]| -> Vec<&'a Record> { pool.iter().copied().filter(|&r| r != record).collect() };
        let (mut chosen, mut there) = (Vec::new(), 0);
        if let Some((pool, random)) = self.pools.get_mut(&record.description[..]) {
            let open = if self.spare { others(pool) } else { pool.clone() };
            there = open.len();
            if n <= there {
                chosen = match random {
                    None => open[..n].to_vec(),
                    Some(random) if self.spare => {
                        let drawn: Vec<_> =
                            random.sample(pool.len(), pool.len().min(n + 1)).into_iter().map(|i| pool[i]).collect();
                        let mut rest = others(&drawn);
                        rest.truncate(n);
                        // Only where the question stands in the pool more than once.
                        if rest.len() < n {
                            random.sample(there, n).into_iter().map(|i| open[i]).collect()
                        } else {
                            rest
                        }
                    }
                    Some(random) => random.sample(there, n).into_iter().map(|i| pool[i]).collect(),
                };
            }
        }
        if chosen.is_empty() {
            let cause =
                format!("{n} solved records are wanted in front of a question, there are {there} to take them from");
            return Err(Error::new(Kind::Argument, cause).action("lower --shots, or name more with --shots-from"));
        }
        Ok(chosen)
    }
}

impl Record {
    /// The question with its answer, as a shot.
    fn solved(&self) -> String {
        match &self.ask {
            Ask::Choices { context, choices } => format!("{context} {}\n\n", choices[self.gold]),
            Ask::Contexts { contexts, continuation } => format!("{} {continuation}\n\n", contexts[self.gold]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(context: &str, description: &str) -> Record {
        let choices = vec!["x".to_string(), context.to_lowercase()];
        let ask = Ask::Choices { context: context.into(), choices };
        Record { id: None, description: description.into(), ask, gold: 1 }
    }

    fn pool(n: usize) -> Vec<Record> {
        (0..n).map(|i| record(&format!("Q{i}"), "")).collect()
    }

    /// The numbers of the records in front of each question.
    fn chosen(shots: &mut Shots, questions: &[Record]) -> Vec<Vec<usize>> {
        let number = |line: &str| line.trim_start_matches('Q').split(' ').next().unwrap().parse().unwrap();
        let of = |text: String| text.split("\n\n").filter(|line| !line.is_empty()).map(number).collect();
        questions.iter().map(|question| of(shots.before(question).unwrap())).collect()
    }

    #[test]
    fn the_first_records_but_not_the_question() {
        let pool = pool(4);
        let mut shots = Shots::new(&pool, 2, None, true);
        assert_eq!(shots.before(&pool[1]).unwrap(), "Q0 q0\n\nQ2 q2\n\n");
        assert_eq!(chosen(&mut shots, &pool), [[1, 2], [0, 2], [0, 1], [0, 1]]);
        let other = record("else", "");
        assert_eq!(chosen(&mut Shots::new(&pool, 3, None, false), &[other]), [[0, 1, 2]]);
        assert_eq!(Shots::new(&pool, 0, Some(1), true).before(&record("a", "D ")).unwrap(), "D ");
    }

    /// Of `ContextSampler` of lm-evaluation-harness 0.4.13 with `rnd=1234`.
    #[test]
    fn draws_are_the_harness_s() {
        let pool = pool(9);
        let mut shots = Shots::new(&pool, 3, Some(1234), true);
        assert_eq!(chosen(&mut shots, &pool[..4]), [[7, 1, 6], [0, 8, 2], [3, 0, 7], [5, 7, 4]]);
        let questions: Vec<Record> = (0..4).map(|i| record(&format!("else {i}"), "")).collect();
        assert_eq!(
            chosen(&mut Shots::new(&pool, 3, Some(1234), false), &questions),
            [[7, 1, 0], [1, 0, 5], [1, 8, 6], [5, 3, 0]]
        );
    }

    /// Records of another subject are no examples, and contexts are completed.
    #[test]
    fn shots_are_of_the_same_description() {
        let mut pool = vec![record("A", "one "), record("B", "two "), record("C", "one "), record("D", "one ")];
        let contexts = vec!["right".to_string(), "wrong".into()];
        pool[2].ask = Ask::Contexts { contexts, continuation: "end".into() };
        pool[2].gold = 0;
        let mut shots = Shots::new(&pool, 2, None, true);
        assert_eq!(shots.before(&pool[3]).unwrap(), "one A a\n\nright end\n\n");
        for (record, there) in [(&pool[1], 0), (&record("E", "three"), 0)] {
            let error = shots.before(record).unwrap_err().to_string();
            assert!(
                error.contains(&format!("there are {there} to take")) && error.contains("; lower --shots"),
                "{error}"
            );
        }
    }
}
