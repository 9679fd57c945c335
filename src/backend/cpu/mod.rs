//! stub until merge
use super::*;
pub struct CpuBackend;
impl CpuBackend {
    pub fn new(_: Option<usize>) -> Result<Self> {
        unimplemented!()
    }
}
impl Ops for CpuBackend {
    fn embed(&mut self, _: &Embed) -> Result<()> {
        Ok(())
    }
    fn rope_angles(&mut self, _: &RopeAngles) -> Result<()> {
        Ok(())
    }
    fn norm_gate(&mut self, _: &NormGate) -> Result<()> {
        Ok(())
    }
    fn route(&mut self, _: &Route) -> Result<()> {
        Ok(())
    }
    fn qkv(&mut self, _: &Qkv) -> Result<()> {
        Ok(())
    }
    fn rope_append(&mut self, _: &RopeAppend) -> Result<()> {
        Ok(())
    }
    fn attend(&mut self, _: &Attend) -> Result<()> {
        Ok(())
    }
    fn project_add(&mut self, _: &ProjectAdd) -> Result<()> {
        Ok(())
    }
    fn swiglu(&mut self, _: &SwiGlu) -> Result<()> {
        Ok(())
    }
    fn logits(&mut self, _: &Logits) -> Result<()> {
        Ok(())
    }
    fn logprobs(&mut self, _: &LogProbs) -> Result<()> {
        Ok(())
    }
}
impl Backend for CpuBackend {
    fn info(&self) -> &DeviceInfo {
        unimplemented!()
    }
    fn upload(&mut self, _: &Tensor) -> Result<Weight> {
        unimplemented!()
    }
    fn reserve(&mut self, _: usize, _: usize, _: &KvLayout) -> Result<()> {
        unimplemented!()
    }
    fn write_ints(&mut self, _: Ints, _: &[u32]) -> Result<()> {
        Ok(())
    }
    fn write_floats(&mut self, _: Mat, _: &[f32]) -> Result<()> {
        Ok(())
    }
    fn read_ints(&mut self, _: Ints, _: &mut [u32]) -> Result<()> {
        Ok(())
    }
    fn read_floats(&mut self, _: Mat, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn kv_pages(&mut self, _: usize, _: usize, _: usize, _: &[u32]) -> Result<()> {
        Ok(())
    }
    fn kv_len(&mut self, _: usize, _: usize, _: usize) -> Result<()> {
        Ok(())
    }
    fn step(&mut self, _: Option<StepKey>, b: &mut (dyn FnMut(&mut dyn Backend) -> Result<()> + Send)) -> Result<()> {
        b(self)
    }
    fn meter(&mut self) -> &mut Meter {
        unimplemented!()
    }
}
