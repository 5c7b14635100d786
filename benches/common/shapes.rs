//! Shapes named after models, and the two that the figures are drawn for.

use cut_cross_entropy::Shape;

/// A shape with a name.
#[derive(Debug, Clone, Copy)]
pub struct NamedShape {
    pub name: &'static str,
    pub shape: Shape,
}

const fn named(name: &'static str, tokens: usize, vocab: usize, hidden: usize) -> NamedShape {
    NamedShape { name, shape: Shape { tokens, hidden, vocab } }
}

/// Vocabulary and hidden size as in the published configurations; 8192 tokens as in the papers that compare losses.
pub const NAMED_SHAPES: [NamedShape; 12] = [
    named("gemma2_2b", 8192, 256_000, 2304),
    named("gemma2_9b", 8192, 256_000, 3584),
    named("gemma3_1b", 8192, 262_144, 1152),
    named("llama2_7b", 8192, 32_000, 4096),
    named("llama3_1b", 8192, 128_256, 2048),
    named("llama3_8b", 8192, 128_256, 4096),
    named("qwen2_5_0_5b", 8192, 151_936, 896),
    named("qwen2_5_7b", 8192, 152_064, 3584),
    named("gpt2", 8192, 50_257, 768),
    named("phi3_mini", 8192, 32_064, 3072),
    named("figure_64k", 2048, 65_536, 1024),
    named("figure_qwen", 1024, 151_936, 896),
];

/// The shape of that name.
pub fn find(name: &str) -> Option<NamedShape> {
    NAMED_SHAPES.into_iter().find(|s| s.name == name)
}
