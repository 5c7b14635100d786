//! Every backend against the `f64` oracle, over the case table. A backend joins by one line: `conformance!(cpu, Cpu)`.

#[macro_use]
mod common;

use common::cases;

conformance!(cpu, Ok::<_, String>(cut_cross_entropy::Cpu));

#[test]
fn case_names_are_unique_and_reasons_are_given() {
    let all: Vec<_> =
        [cases::shapes(), cases::distributions(), cases::options(), cases::dtypes()].into_iter().flatten().collect();
    let names: std::collections::HashSet<_> = all.iter().map(|c| c.name).collect();
    assert_eq!(names.len(), all.len());
    assert!(all.iter().all(|c| c.why.len() > 10));
}
