//! The conformance suite as tests of one backend.

/// The suite for one backend. `$make` returns the backend, or the reason why this machine does not have it; `$keep` says of
/// a case whether to run it.
#[allow(unused_macros)] // of some test binaries
macro_rules! conformance {
    ($name:ident, $make:expr) => {
        conformance!($name, $make, |_| true);
    };
    ($name:ident, $make:expr, $keep:expr) => {
        mod $name {
            #[allow(unused_imports)] // what `$make` and `$keep` may need
            use super::*;
            use $crate::common::{cases, conformance::skip, suite};

            fn with(test: impl FnOnce(&suite::HostBackend)) {
                match $make {
                    Ok(backend) => test(&backend),
                    Err(reason) => skip(stringify!($name), reason),
                }
            }

            fn kept(mut cases: Vec<cases::Case>) -> Vec<cases::Case> {
                let keep: fn(&cases::Case) -> bool = $keep;
                cases.retain(keep);
                cases
            }

            #[test]
            fn matches_the_oracle_on_every_shape() {
                with(|backend| suite::check_cases(backend, &kept(cases::shapes())));
            }
            #[test]
            fn matches_the_oracle_on_every_distribution() {
                with(|backend| suite::check_cases(backend, &kept(cases::distributions())));
            }
            #[test]
            fn matches_the_oracle_under_every_option() {
                with(|backend| suite::check_cases(backend, &kept(cases::options())));
            }
            #[test]
            fn matches_the_oracle_in_every_dtype() {
                with(|backend| suite::check_cases(backend, &kept(cases::dtypes())));
            }
            #[test]
            fn is_no_worse_than_the_naive_f32_computation() {
                with(|backend| {
                    let all = kept(cases::shapes()).into_iter().chain(kept(cases::distributions()));
                    for case in all.filter(|c| c.spec.tokens * c.spec.vocab >= 10_000) {
                        suite::check_no_worse_than_naive(backend, &case);
                    }
                });
            }
        }
    };
}

/// A skip is printed, and is a failure where the environment says that the backend must be there.
pub fn skip(backend: &str, reason: String) {
    let required = format!("REQUIRE_{}", backend.to_uppercase());
    assert!(std::env::var_os(&required).is_none(), "{required} is set, but: {reason}");
    eprintln!("skipped: {backend}: {reason}");
}
