//! What is legal. [`Problem::new`] is the only place that validates; everything after it may rely on what it checked.

use crate::memory::{Buffer, Values};
use crate::{CceOptions, DType, Error, Host, Memory, Result};

/// A borrowed row-major matrix: `rows` rows of `columns` contiguous elements, `row_stride` elements apart.
#[derive(Debug)]
pub struct Matrix<'a, M: Memory = Host> {
    /// The elements, starting at row 0.
    pub data: M::Slice<'a>,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns, contiguous in memory.
    pub columns: usize,
    /// Distance between the starts of neighbouring rows, in elements; at least `columns`.
    pub row_stride: usize,
}

impl<M: Memory> Clone for Matrix<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for Matrix<'_, M> {}

impl<'a, M: Memory> Matrix<'a, M> {
    /// A dense matrix. Lengths are checked by [`Problem::new`].
    pub fn new(data: impl Into<M::Slice<'a>>, rows: usize, columns: usize) -> Self {
        Matrix { data: data.into(), rows, columns, row_stride: columns }
    }

    /// The same matrix with its rows `row_stride` elements apart.
    pub fn with_row_stride(self, row_stride: usize) -> Self {
        Matrix { row_stride, ..self }
    }

    /// `[rows, columns]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    fn check(&self, tensor: &'static str) -> Result<()> {
        let Matrix { rows, columns, row_stride, .. } = *self;
        if row_stride < columns {
            return Err(Error::RowStride { tensor, row_stride, columns });
        }
        let overflow = || Error::Overflow { what: "bytes of a tensor", factors: vec![rows, row_stride, 4] };
        // `isize::MAX` is the most that any Rust allocation can hold; 4 bytes, so that an f32 gradient fits too.
        let bytes = rows.checked_mul(row_stride).and_then(|n| n.checked_mul(4)).ok_or_else(overflow)?;
        isize::try_from(bytes).map_err(|_| overflow())?;
        let needed = if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row_stride + columns };
        if self.data.len() < needed {
            return Err(Error::BufferTooShort {
                tensor,
                shape: self.shape(),
                row_stride,
                needed,
                len: self.data.len(),
            });
        }
        Ok(())
    }
}

/// The tensors of the operation, all borrowed.
///
/// ```
/// use cut_cross_entropy::{Inputs, Matrix};
/// let (e, c, bias) = ([0.5_f32; 2 * 4], [0.1_f32; 3 * 4], [0.0_f32; 3]);
/// let inputs = Inputs::new(Matrix::new(&e, 2, 4), Matrix::new(&c, 3, 4), &[2_i64, -100]);
/// let inputs: Inputs = Inputs { bias: Some((&bias).into()), ..inputs };
/// ```
#[derive(Debug)]
pub struct Inputs<'a, M: Memory = Host> {
    /// E [N, D], `f32`, `f16` or `bf16`: one row a token.
    pub embeddings: Matrix<'a, M>,
    /// C [V, D], the same dtype: one row a class.
    pub classifier: Matrix<'a, M>,
    /// y `[N]`, `i64`, `i32` or `u32`: classes in [0, V) or `ignore_index`.
    pub targets: M::Slice<'a>,
    /// bias `[V]`, any floating-point dtype, added to the scaled logits before the softcap. `-inf` masks a class.
    pub bias: Option<M::Slice<'a>>,
    /// Weight of each class `[V]`, `f32`, finite and not negative: PyTorch's `weight`.
    pub class_weights: Option<M::Slice<'a>>,
    /// Weight of each token `[N]`, `f32`, finite; multiplies the token's whole loss and counts in the mean's
    /// denominator. Indexed like the embeddings, also when `shift` is not 0.
    pub token_weights: Option<M::Slice<'a>>,
    /// Tokens a sequence, when `shift` is not 0; must divide N. `None`: all tokens are one sequence.
    pub seq_len: Option<usize>,
}

impl<M: Memory> Clone for Inputs<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<M: Memory> Copy for Inputs<'_, M> {}

impl<'a, M: Memory> Inputs<'a, M> {
    /// Embeddings, classifier and targets; the optional tensors are fields.
    pub fn new(embeddings: Matrix<'a, M>, classifier: Matrix<'a, M>, targets: impl Into<M::Slice<'a>>) -> Self {
        Inputs {
            embeddings,
            classifier,
            targets: targets.into(),
            bias: None,
            class_weights: None,
            token_weights: None,
            seq_len: None,
        }
    }
}

/// The three sizes of the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// N, rows of the embeddings.
    pub tokens: usize,
    /// D, columns of both matrices.
    pub hidden: usize,
    /// V, rows of the classifier.
    pub vocab: usize,
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "N={} V={} D={}", self.tokens, self.vocab, self.hidden)
    }
}

/// Inputs and options that passed every check. Backends take nothing else.
#[derive(Debug)]
pub struct Problem<'a, M: Memory = Host> {
    inputs: Inputs<'a, M>,
    options: CceOptions,
    shape: Shape,
}

impl<'a, M: Memory> Problem<'a, M> {
    /// Checks shapes against each other, dtypes, buffer lengths, size overflow, options, and, where the memory can be
    /// read without waiting, targets and weights.
    ///
    /// # Errors
    /// Any variant of [`Error`] but those about a forward, an upstream gradient, an allocation or a device.
    pub fn new(inputs: &Inputs<'a, M>, options: &CceOptions) -> Result<Self> {
        options.check()?;
        let (e, c) = (&inputs.embeddings, &inputs.classifier);
        require_dtype("embeddings", e.data.dtype(), DType::is_float, "f32, f16 or bf16")?;
        require_dtype("classifier", c.data.dtype(), |d| d == e.data.dtype(), "the dtype of embeddings")?;
        if e.columns != c.columns {
            return Err(Error::ShapeMismatch {
                left: "embeddings",
                left_shape: e.shape().into(),
                right: "classifier",
                right_shape: c.shape().into(),
                dimension: "hidden",
            });
        }
        e.check("embeddings")?;
        c.check("classifier")?;
        let shape = Shape { tokens: e.rows, hidden: e.columns, vocab: c.rows };
        check_sizes(shape)?;

        require_dtype("targets", inputs.targets.dtype(), |d| !d.is_float(), "i64, i32 or u32")?;
        check_vector("targets", Some(&inputs.targets), ("embeddings", e.shape()), "tokens")?;
        let vectors = [
            ("bias", inputs.bias, ("classifier", c.shape()), "vocab"),
            ("class_weights", inputs.class_weights, ("classifier", c.shape()), "vocab"),
            ("token_weights", inputs.token_weights, ("embeddings", e.shape()), "tokens"),
        ];
        for (tensor, vector, owner, dimension) in vectors {
            let Some(vector) = vector else { continue };
            check_vector(tensor, Some(&vector), owner, dimension)?;
            if tensor == "bias" {
                require_dtype(tensor, vector.dtype(), DType::is_float, "f32, f16 or bf16")?;
            } else {
                require_dtype(tensor, vector.dtype(), |d| d == DType::F32, "f32")?;
            }
        }
        check_shift(shape.tokens, inputs.seq_len, options.shift)?;
        M::check_values(&Values {
            targets: inputs.targets,
            vocab: shape.vocab,
            ignore_index: options.ignore_index,
            class_weights: inputs.class_weights,
            token_weights: inputs.token_weights,
        })?;
        Ok(Problem { inputs: *inputs, options: *options, shape })
    }

    /// The checked tensors.
    pub fn inputs(&self) -> &Inputs<'a, M> {
        &self.inputs
    }
    /// The checked options.
    pub fn options(&self) -> &CceOptions {
        &self.options
    }
    /// N, D and V.
    pub fn shape(&self) -> Shape {
        self.shape
    }
    /// Element type of embeddings and classifier.
    pub fn dtype(&self) -> DType {
        self.inputs.embeddings.data.dtype()
    }

    /// Position in `targets` that belongs to token `token`, or `None` where the shift leaves the sequence.
    pub fn target_position(&self, token: usize) -> Option<usize> {
        let seq_len = self.inputs.seq_len.unwrap_or(self.shape.tokens);
        (token % seq_len.max(1) + self.options.shift < seq_len).then_some(token + self.options.shift)
    }
}

impl Problem<'_, Host> {
    /// The class of token `token`, or `None` where the token is ignored.
    pub fn target(&self, token: usize) -> Option<usize> {
        let value = self.inputs.targets.index_at(self.target_position(token)?);
        (value != self.options.ignore_index).then_some(value as usize)
    }

    /// The token's weight, 1 where none are given.
    pub fn token_weight(&self, token: usize) -> f32 {
        self.inputs.token_weights.map_or(1.0, |w| w.float_at(token))
    }

    /// The class's weight, 1 where none are given.
    pub fn class_weight(&self, class: usize) -> f32 {
        self.inputs.class_weights.map_or(1.0, |w| w.float_at(class))
    }
}

fn require_dtype(
    tensor: &'static str,
    found: DType,
    legal: impl Fn(DType) -> bool,
    expected: &'static str,
) -> Result<()> {
    if legal(found) { Ok(()) } else { Err(Error::DType { tensor, found, expected }) }
}

/// A vector must have exactly as many elements as `owner` has rows.
pub(crate) fn check_vector<B: Buffer>(
    tensor: &'static str,
    vector: Option<&B>,
    (owner, owner_shape): (&'static str, [usize; 2]),
    dimension: &'static str,
) -> Result<()> {
    match vector {
        Some(vector) if vector.len() != owner_shape[0] => Err(Error::ShapeMismatch {
            left: tensor,
            left_shape: vec![vector.len()],
            right: owner,
            right_shape: owner_shape.into(),
            dimension,
        }),
        _ => Ok(()),
    }
}

fn check_sizes(Shape { tokens, hidden, vocab }: Shape) -> Result<()> {
    // Class indices are stored in 32 bits, with one value left over for "none".
    if u32::try_from(vocab).map_or(true, |v| v == u32::MAX) || u32::try_from(tokens).is_err() {
        return Err(Error::Overflow { what: "a 32-bit index of tokens or classes", factors: vec![tokens, vocab] });
    }
    for (what, rows, columns) in [("tokens * vocab", tokens, vocab), ("bytes of a gradient", tokens.max(vocab), hidden)]
    {
        let bytes = rows.checked_mul(columns).and_then(|n| n.checked_mul(4));
        if bytes.is_none_or(|b| isize::try_from(b).is_err()) {
            return Err(Error::Overflow { what, factors: vec![rows, columns, 4] });
        }
    }
    Ok(())
}

fn check_shift(tokens: usize, seq_len: Option<usize>, shift: usize) -> Result<()> {
    let seq = seq_len.unwrap_or(tokens);
    let err = |requirement| Err(Error::Shift { shift, seq_len: seq, tokens, requirement });
    if seq_len.is_some_and(|s| s == 0 || !tokens.is_multiple_of(s)) {
        return err("the sequence length must divide the number of tokens");
    }
    if shift > 0 && tokens > 0 && shift >= seq {
        return err("the shift must be smaller than a sequence");
    }
    Ok(())
}
