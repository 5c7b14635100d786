//! The comparison itself: whatever it lets through, no other test can catch.

mod common;

use common::compare::{bits, check_close, rounding};
use common::frobenius;
use cut_cross_entropy::DType::{BF16, F16, F32};

const EXACT: [f64; 6] = [1.0, -2.0, 0.5, 4.0, -0.25, 3.0];

fn ours() -> Vec<f32> {
    EXACT.iter().map(|&x| x as f32).collect()
}

fn verdict(ours: &[f32], exact: &[f64], tolerance: f64) -> Result<f64, String> {
    check_close("x", F32, 3, ours, exact, &vec![tolerance; exact.len()])
}

#[test]
fn equal_values_pass_with_no_tolerance() {
    assert_eq!(verdict(&ours(), &EXACT, 0.0), Ok(0.0));
}

#[test]
fn nan_fails_whatever_the_tolerance() {
    for at in 0..6 {
        let mut ours = ours();
        ours[at] = f32::NAN;
        let message = verdict(&ours, &EXACT, f64::MAX).unwrap_err();
        assert!(message.contains(&format!("x[{}, {}]", at / 3, at % 3)), "{message}");
    }
}

#[test]
fn nan_passes_only_where_nan_is_right() {
    let (mut ours, mut exact) = (ours(), EXACT);
    exact[2] = f64::NAN;
    assert!(verdict(&ours, &exact, 1.0).is_err());
    ours[2] = f32::NAN;
    assert!(verdict(&ours, &exact, 0.0).is_ok());
    ours.swap(2, 3);
    assert!(verdict(&ours, &exact, 1e9).is_err());
}

#[test]
fn infinities_are_told_from_each_other_and_from_large_numbers() {
    let inf = f64::INFINITY;
    for (a, b) in [(f32::INFINITY, 1.0), (f32::MAX, inf), (f32::INFINITY, -inf), (f32::NAN, inf)] {
        assert!(verdict(&[a], &[b], f64::MAX).is_err(), "{a} {b}");
    }
    assert!(verdict(&[f32::NEG_INFINITY], &[-inf], 0.0).is_ok());
    // Out of f16's range is an infinity in f16, and only there.
    assert!(check_close("x", F16, 1, &[f32::INFINITY], &[1e6], &[0.0]).is_ok());
    assert!(check_close("x", F16, 1, &[65_504.0], &[1e6], &[1e7]).is_err());
    assert!(check_close("x", BF16, 1, &[f32::INFINITY], &[1e6], &[1e7]).is_err());
}

#[test]
fn swapped_rows_fail() {
    let mut ours = ours();
    ours.rotate_left(3);
    assert!(verdict(&ours, &EXACT, 1e-3).is_err());
}

#[test]
fn a_missing_or_added_tail_fails() {
    assert!(verdict(&ours()[..5], &EXACT, 1e9).is_err());
    assert!(verdict(&[], &EXACT, 1e9).is_err());
    assert!(check_close("x", F32, 3, &ours(), &EXACT, &[1.0; 5]).is_err());
    let mut unwritten = ours();
    unwritten[5] = 0.0;
    assert!(verdict(&unwritten, &EXACT, 1e-3).unwrap_err().contains("[1, 2]"));
}

#[test]
fn a_nan_or_negative_tolerance_lets_nothing_through() {
    let off: Vec<f32> = ours().iter().map(|x| x + 0.5).collect();
    assert!(verdict(&off, &EXACT, f64::NAN).is_err());
    assert!(verdict(&off, &EXACT, -1.0).is_err());
    assert!(verdict(&off, &EXACT, 0.5).is_ok());
}

#[test]
fn the_worst_element_is_named_with_both_values() {
    let mut ours = ours();
    ours[1] += 0.01;
    ours[4] += 0.1;
    let message = verdict(&ours, &EXACT, 1e-3).unwrap_err();
    assert!(message.contains("x[1, 1]") && message.contains("2 of 6") && message.contains("-2.5e-1"), "{message}");
}

#[test]
fn one_rounding_of_the_dtype_is_allowed_and_no_more() {
    for (dtype, ulp) in [(F32, 2.0_f64.powi(-23)), (F16, 2.0_f64.powi(-10)), (BF16, 2.0_f64.powi(-7))] {
        assert_eq!(rounding(dtype, 1.0), ulp / 2.0);
        assert!(check_close("x", dtype, 1, &[(1.0 + ulp) as f32], &[1.0 + 0.5 * ulp], &[0.0]).is_ok());
        assert!(check_close("x", dtype, 1, &[(1.0 + ulp) as f32], &[1.0], &[0.0]).is_err());
    }
}

#[test]
fn frobenius_error_and_bits() {
    assert_eq!(frobenius(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
    assert_eq!(frobenius(&[3.0, 0.0], &[3.0, 4.0]), 0.8);
    assert_ne!(bits(&[0.0]), bits(&[-0.0]));
    assert_eq!(bits(&[f32::NAN]), bits(&[f32::NAN]));
}
