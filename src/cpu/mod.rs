//! stub
use crate::*;
/// stub
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;
impl Backend for Cpu {
    type Memory = Host;
    fn name(&self) -> &'static str {
        "cpu"
    }
    fn allocate(&self, tensor: &'static str, dtype: DType, len: usize) -> Result<HostBuffer> {
        HostBuffer::zeros(tensor, dtype, len)
    }
    fn borrow_mut<'a>(&self, owned: &'a mut HostBuffer) -> HostSliceMut<'a> {
        owned.as_mut()
    }
    fn forward(&self, _: &Problem<'_>) -> Result<Forward> {
        todo!()
    }
    fn backward(&self, _: &Problem<'_>, _: &Forward, _: &Upstream<'_>, _: GradientSinks<'_>) -> Result<Telemetry> {
        todo!()
    }
}
