//! What `cce bench` and the criterion benches share: inputs that look like a trained model's, the materialising
//! baseline, and the check that nothing is timed before it is right.

pub mod baseline;
pub mod matmul;
pub mod shapes;
pub mod slice_oracle;
pub mod survey;
pub mod workload;
