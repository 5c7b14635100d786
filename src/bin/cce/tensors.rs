//! Tensors from and to safetensors files. Each tensor is read straight into a buffer aligned for its elements, so the
//! alignment inside the file does not matter; outputs are written from where they are.

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian; `cce` reads and writes them without swapping bytes");

use anyhow::{Context, anyhow, bail, ensure};
use bytemuck::{Pod, Zeroable};
use cut_cross_entropy::{HostBuffer, HostSlice};
use safetensors::tensor::{Dtype, Metadata, View, serialize_to_file};
use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes of the header's length, at the start of the file.
const LENGTH_BYTES: u64 = 8;

/// An open file whose header was checked.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    data_start: u64,
}

/// A tensor in memory.
pub struct Tensor {
    pub shape: Vec<usize>,
    data: Data,
}

enum Data {
    F32(Vec<f32>),
    F16(Vec<half::f16>),
    BF16(Vec<half::bf16>),
    I64(Vec<i64>),
    I32(Vec<i32>),
    U32(Vec<u32>),
}

impl TensorFile {
    /// Opens a file and reads its header.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        Self::open_unnamed(path).with_context(|| path.display().to_string())
    }

    fn open_unnamed(path: &Path) -> anyhow::Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut prefix = [0; LENGTH_BYTES as usize];
        file.read_exact(&mut prefix).map_err(|_| anyhow!("not a safetensors file: shorter than 8 bytes"))?;
        let header_bytes = u64::from_le_bytes(prefix);
        ensure!(
            header_bytes <= length - LENGTH_BYTES,
            "not a safetensors file, or truncated: its header says {header_bytes} bytes, the file has {length}"
        );
        let mut header = vec![0; usize::try_from(header_bytes)?];
        file.read_exact(&mut header)?;
        let metadata: Metadata = serde_json::from_slice(&header).context("not a safetensors header")?;
        let data_start = LENGTH_BYTES + header_bytes;
        let expected = data_start + metadata.data_len() as u64;
        ensure!(expected == length, "truncated or overlong: its tensors end at byte {expected}, the file has {length}");
        Ok(TensorFile { path: path.into(), file, metadata, data_start })
    }

    /// Reads a tensor that must be there.
    pub fn require(&mut self, name: &str) -> anyhow::Result<Tensor> {
        match self.read(name)? {
            Some(tensor) => Ok(tensor),
            None => bail!("{}: no tensor `{name}`; it has {}", self.path.display(), self.names()),
        }
    }

    /// Reads a tensor if it is there.
    pub fn read(&mut self, name: &str) -> anyhow::Result<Option<Tensor>> {
        let Some(info) = self.metadata.info(name) else { return Ok(None) };
        let (start, end) = info.data_offsets;
        let bytes = end - start;
        let (dtype, shape) = (info.dtype, info.shape.clone());
        let place = || format!("{}: tensor `{name}`", self.path.display());
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.data_start + start as u64)).with_context(place)?;
        let data = match dtype {
            Dtype::F32 => elements(file, bytes).map(Data::F32),
            Dtype::F16 => elements(file, bytes).map(Data::F16),
            Dtype::BF16 => elements(file, bytes).map(Data::BF16),
            Dtype::I64 => elements(file, bytes).map(Data::I64),
            Dtype::I32 => elements(file, bytes).map(Data::I32),
            Dtype::U32 => elements(file, bytes).map(Data::U32),
            other => bail!("{} has dtype {other:?}; expected F32, F16, BF16, I64, I32 or U32", place()),
        };
        Ok(Some(Tensor { shape, data: data.with_context(place)? }))
    }

    fn names(&self) -> String {
        let mut names = self.metadata.offset_keys();
        names.sort();
        match names.is_empty() {
            true => "none".into(),
            false => names.join(", "),
        }
    }
}

/// Reads `bytes` bytes into a vector that is aligned by its type. The header was checked: `bytes` is a multiple.
fn elements<T: Pod + Zeroable>(mut file: &File, bytes: usize) -> anyhow::Result<Vec<T>> {
    let mut elements = Vec::new();
    elements.try_reserve_exact(bytes / size_of::<T>())?;
    elements.resize(bytes / size_of::<T>(), T::zeroed());
    file.read_exact(bytemuck::cast_slice_mut(&mut elements))?;
    Ok(elements)
}

impl Tensor {
    /// The elements.
    pub fn slice(&self) -> HostSlice<'_> {
        match &self.data {
            Data::F32(v) => v.into(),
            Data::F16(v) => v.into(),
            Data::BF16(v) => v.into(),
            Data::I64(v) => v.into(),
            Data::I32(v) => v.into(),
            Data::U32(v) => v.into(),
        }
    }

    /// Rows and columns of a matrix.
    pub fn matrix(&self, name: &str) -> anyhow::Result<[usize; 2]> {
        match self.shape[..] {
            [rows, columns] => Ok([rows, columns]),
            _ => bail!("{name} has shape {:?}; expected a matrix", self.shape),
        }
    }

    /// Checks that it is a vector.
    pub fn require_vector(&self, name: &str) -> anyhow::Result<()> {
        ensure!(self.shape.len() == 1, "{name} has shape {:?}; expected a vector", self.shape);
        Ok(())
    }

    /// The elements as class indices.
    pub fn to_indices(&self) -> anyhow::Result<Vec<i64>> {
        Ok(match &self.data {
            Data::I64(v) => v.clone(),
            Data::I32(v) => v.iter().map(|&x| x.into()).collect(),
            Data::U32(v) => v.iter().map(|&x| x.into()).collect(),
            _ => bail!("targets must be i64, i32 or u32"),
        })
    }

    /// The elements as a floating-point buffer.
    pub fn into_buffer(self, name: &str) -> anyhow::Result<HostBuffer> {
        Ok(match self.data {
            Data::F32(v) => HostBuffer::F32(v),
            Data::F16(v) => HostBuffer::F16(v),
            Data::BF16(v) => HostBuffer::BF16(v),
            _ => bail!("{name} must be f32, f16 or bf16"),
        })
    }
}

/// A tensor to be written, borrowed.
pub struct Output<'a> {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: &'a [u8],
}

impl<'a> Output<'a> {
    /// f32 elements.
    pub fn floats(name: &'static str, shape: &[usize], elements: &'a [f32]) -> Self {
        Output { name, dtype: Dtype::F32, shape: shape.into(), bytes: bytemuck::cast_slice(elements) }
    }

    /// u32 elements.
    pub fn indices(name: &'static str, shape: &[usize], elements: &'a [u32]) -> Self {
        Output { name, dtype: Dtype::U32, shape: shape.into(), bytes: bytemuck::cast_slice(elements) }
    }

    /// i64 elements.
    pub fn targets(name: &'static str, shape: &[usize], elements: &'a [i64]) -> Self {
        Output { name, dtype: Dtype::I64, shape: shape.into(), bytes: bytemuck::cast_slice(elements) }
    }

    /// A gradient, or another matrix.
    pub fn gradient(name: &'static str, shape: &[usize], buffer: &'a HostBuffer) -> anyhow::Result<Self> {
        let (dtype, bytes) = match buffer {
            HostBuffer::F32(v) => (Dtype::F32, bytemuck::cast_slice(v)),
            HostBuffer::F16(v) => (Dtype::F16, bytemuck::cast_slice(v)),
            HostBuffer::BF16(v) => (Dtype::BF16, bytemuck::cast_slice(v)),
            _ => bail!("{name} has an element type that safetensors lacks"),
        };
        Ok(Output { name, dtype, shape: shape.into(), bytes })
    }

    /// Size of the elements.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }
}

impl View for &Output<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Whether a file can be put there, found out before the work and not after it.
pub fn check_writable(path: &Path) -> anyhow::Result<()> {
    temporary_beside(path).map(drop)
}

/// Writes all tensors to a temporary file beside `path` and renames it: `path` is whole or untouched.
pub fn write(path: &Path, outputs: &[Output<'_>]) -> anyhow::Result<()> {
    // Closed: Wine, at least, does not let a file that is open here be truncated by its name.
    let temporary = temporary_beside(path)?.into_temp_path();
    let write = || -> anyhow::Result<()> {
        serialize_to_file(outputs.iter().map(|o| (o.name, o)), None, &temporary)?;
        OpenOptions::new().write(true).open(&temporary)?.sync_all()?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))?;
    temporary.persist(path).map_err(|e| e.error).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// A file that vanishes unless it is renamed.
fn temporary_beside(path: &Path) -> anyhow::Result<tempfile::NamedTempFile> {
    ensure!(path.file_name().is_some() && !path.is_dir(), "cannot write {}: it is a directory", path.display());
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".cce-").suffix(".tmp");
    #[cfg(unix)]
    {
        // As any new file: the process's mask applies, not the private mode of temporary files.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    // The path of the temporary file would only confuse, so the bare cause is kept.
    builder.tempfile_in(directory).map_err(|e| anyhow!("cannot write {}: {}", path.display(), e.kind()))
}
