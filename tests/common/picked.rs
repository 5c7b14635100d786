//! `CCE_CASES=bias,f16` picks cases, `CCE_FILTERS=0,1` filters by their numbers. What is not known is an error: a test that runs nothing
//! passes.

use std::env::{self, VarError};

/// What the variable picks of `known`; `None` where it is not set.
pub fn picked(variable: &str, known: &[String]) -> Option<Vec<String>> {
    match env::var(variable) {
        Ok(value) => Some(parse(variable, &value, known).unwrap_or_else(|error| panic!("{error}"))),
        Err(VarError::NotPresent) => None,
        Err(error) => panic!("{variable}: {error}"),
    }
}

/// The names in a list by commas.
pub fn parse(variable: &str, value: &str, known: &[String]) -> Result<Vec<String>, String> {
    let names: Vec<String> = value.split(',').map(|name| name.trim().to_string()).collect();
    match names.iter().find(|name| !known.contains(name)) {
        Some(name) => Err(format!("{variable}={value}: `{name}` is none of {}", known.join(" "))),
        None => Ok(names),
    }
}
