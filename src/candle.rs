//! The loss as a differentiable candle operation.
