//! A safe face for the one cuBLAS call: what T is measured with and what the baseline is made of. The library is loaded when
//! the first device is opened.

use anyhow::{Context, ensure};
use cut_cross_entropy::DType;
use cut_cross_entropy::cuda::cudarc::cublas::{CudaBlas, result, sys};
use cut_cross_entropy::cuda::cudarc::driver::CudaStream;
use std::sync::Arc;

/// A dense row-major matrix in device memory.
#[derive(Debug, Clone, Copy)]
pub struct View {
    pub address: u64,
    pub dtype: DType,
    pub rows: usize,
    pub columns: usize,
    pub transposed: bool,
}

impl View {
    /// As it lies.
    pub fn new(address: u64, dtype: DType, rows: usize, columns: usize) -> Self {
        View { address, dtype, rows, columns, transposed: false }
    }

    /// The same elements, transposed.
    pub fn transposed(self) -> Self {
        View { transposed: !self.transposed, ..self }
    }

    fn shape(&self) -> (usize, usize) {
        if self.transposed { (self.columns, self.rows) } else { (self.rows, self.columns) }
    }

    fn operation(&self) -> sys::cublasOperation_t {
        if self.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    }
}

/// How f32 inputs are multiplied; 16-bit inputs are exact in either. Sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    Full,
    /// Rounded to TF32.
    Tf32,
}

/// cuBLAS on one stream.
pub struct Blas(CudaBlas);

impl Blas {
    /// Loads the library.
    pub fn new(stream: Arc<CudaStream>) -> anyhow::Result<Self> {
        #[cfg(feature = "dynamic-linking")]
        let present = true; // else the process would not have started
        // SAFETY: loads libraries of that name, whose initialisers only set up tables of their own.
        #[cfg(not(feature = "dynamic-linking"))]
        let present = unsafe { sys::is_culib_present() };
        ensure!(
            present,
            "cuBLAS is not here: put the folder of libcublas.so on LD_LIBRARY_PATH (CUDA's lib64, or nvidia/cublas/lib or \
             nvidia/cu13/lib of Python's packages)"
        );
        Ok(Blas(CudaBlas::new(stream).context("cublasCreate")?))
    }

    /// As cuBLAS counts, e.g. 130002.
    pub fn version(&self) -> anyhow::Result<i32> {
        let mut version = 0;
        // SAFETY: a live handle and a place for an integer.
        unsafe { sys::cublasGetVersion_v2(*self.0.handle(), &mut version) }.result()?;
        Ok(version)
    }

    /// `target = alpha · a · b`.
    ///
    /// # Safety
    /// The matrices must lie, with all their elements, in memory of the stream's device, and `target` overlap neither.
    pub unsafe fn multiply(
        &self,
        alpha: f32,
        a: View,
        b: View,
        target: View,
        precision: Precision,
    ) -> anyhow::Result<()> {
        let ((m, k), (k_of_b, n)) = (a.shape(), b.shape());
        ensure!(k == k_of_b && target.shape() == (m, n) && !target.transposed, "{a:?} times {b:?} is no {target:?}");
        let size = |n: usize| i32::try_from(n).context("a matrix has more rows or columns than cuBLAS counts");
        let beta = 0.0_f32;
        let compute = match precision {
            Precision::Full => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            Precision::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        };
        // cuBLAS counts columns first: to it a row-major matrix is its transpose, and (a b)ᵀ = bᵀ aᵀ.
        // SAFETY: sizes and distances are those of the views, which the caller vouches for; alpha and beta are f32, as the
        // compute type wants, and live through the call.
        unsafe {
            result::gemm_ex(
                *self.0.handle(),
                b.operation(),
                a.operation(),
                size(n)?,
                size(m)?,
                size(k)?,
                (&raw const alpha).cast(),
                b.address as *const _,
                element(b.dtype)?,
                size(b.columns)?,
                a.address as *const _,
                element(a.dtype)?,
                size(a.columns)?,
                (&raw const beta).cast(),
                target.address as *mut _,
                element(target.dtype)?,
                size(target.columns)?,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .context("cublasGemmEx")
    }
}

fn element(dtype: DType) -> anyhow::Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => anyhow::bail!("no matrix is of {other}"),
    }
}
