//! Arithmetic of 16-bit floats, interpreted from PTX, against exact integers: a library's kernels add up gradients in them.
#![cfg(target_os = "linux")]

mod common;

use common::device;
use cudarc::driver::{LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;
use cut_cross_entropy_emulator::Config;
use half::{bf16, f16};

const OPERATIONS: [(&str, usize); 6] = [("add", 2), ("sub", 2), ("mul", 2), ("fma.rn", 3), ("min", 2), ("max", 2)];
const N: usize = 1 << 13;

/// out[i] = operation(a[i], b[i], c[i]) for each of 1024 threads a block.
fn kernel(name: &str, instruction: &str, operands: usize, pair: bool) -> String {
    let (bits, bytes) = if pair { (32, 4) } else { (16, 2) };
    let sources = ["%x1", "%x2", "%x3"][..operands].join(", ");
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64
        .visible .entry {name}(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 out) {{
            .reg .pred %p<2>; .reg .b16 %h<3>; .reg .b{bits} %x<4>; .reg .b32 %r<4>; .reg .b64 %d<10>;
            ld.param.u64 %d1, [a]; ld.param.u64 %d2, [b]; ld.param.u64 %d3, [c]; ld.param.u64 %d4, [out];
            mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r1, 1024, %r2; mul.wide.u32 %d5, %r3, {bytes};
            add.s64 %d6, %d1, %d5; add.s64 %d7, %d2, %d5; add.s64 %d8, %d3, %d5; add.s64 %d9, %d4, %d5;
            ld.global.b{bits} %x1, [%d6]; ld.global.b{bits} %x2, [%d7]; ld.global.b{bits} %x3, [%d8];
            {}
            st.global.b{bits} [%d9], %x1;
            ret;
        }}",
        instruction.replace("SOURCES", &sources)
    )
}

/// What the interpreter makes of `instruction`, whose result is %x1.
fn interpreted(name: &str, instruction: &str, operands: usize, pair: bool, [a, b, c]: [&[u16]; 3]) -> Vec<u16> {
    let device = device(&Config::default());
    let stream = device.context.default_stream();
    let module = device.context.load_module(Ptx::from_src(kernel(name, instruction, operands, pair))).unwrap();
    let function = module.load_function(name).expect("an instruction that the interpreter knows");
    let [a, b, c] = [a, b, c].map(|x| stream.clone_htod(x).unwrap());
    let mut out = stream.alloc_zeros::<u16>(N).unwrap();
    let blocks = N as u32 / if pair { 2048 } else { 1024 };
    let config = LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (1024, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: four buffers of N elements, as the kernel has it.
    unsafe { stream.launch_builder(&function).arg(&a).arg(&b).arg(&c).arg(&mut out).launch(config) }.unwrap();
    stream.clone_dtoh(&out).unwrap()
}

/// A 16-bit format.
struct Format {
    name: &'static str,
    value: fn(u16) -> f64,
    bits: fn(f64) -> u16,
    infinity: u16,
    /// Biased exponents of the random numbers: multiples of 2^-24, whose products do not overflow.
    exponents: std::ops::Range<u16>,
}

fn formats() -> [Format; 2] {
    let f16 = Format {
        name: "f16",
        value: |bits| f16::from_bits(bits).to_f64(),
        bits: |x| f16::from_f64(x).to_bits(),
        infinity: 0x7c00,
        exponents: 0..22,
    };
    let bf16 = Format {
        name: "bf16",
        value: |bits| bf16::from_bits(bits).to_f64(),
        bits: |x| bf16::from_f64(x).to_bits(),
        infinity: 0x7f80,
        exponents: 112..142,
    };
    [f16, bf16]
}

fn is_negative(bits: u16) -> bool {
    bits & 0x8000 != 0
}

impl Format {
    /// Every other number of four exponents only, so that sums cancel.
    fn random(&self, seed: u64) -> Vec<u16> {
        let mantissa = self.infinity.trailing_zeros();
        let mut state = seed;
        let number = |i: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let exponents = [self.exponents.len() as u16, 4][i % 2];
            let exponent = self.exponents.start + (state >> 50) as u16 % exponents;
            let rest = (state >> 33) as u16;
            rest & 0x8000 | exponent << mantissa | rest & ((1 << mantissa) - 1)
        };
        (0..N).map(number).collect()
    }

    /// In units of 2^-24.
    fn exact(&self, bits: u16) -> i128 {
        ((self.value)(bits) * 2_f64.powi(24)) as i128
    }

    /// The nearest number to `x` units of 2^-48, of two the even one; `negative`: if it is zero.
    fn nearest(&self, x: i128, negative: bool) -> u16 {
        if x == 0 {
            return u16::from(negative) << 15;
        }
        let magnitude = x.abs() << 12; // units of 2^-60 hold whatever lies around
        let units = |bits: u16| ((self.value)(bits) * 2_f64.powi(60)) as i128;
        let (mut below, mut beyond) = (0, self.infinity);
        while below + 1 < beyond {
            let middle = (below + beyond) / 2;
            if units(middle) <= magnitude { below = middle } else { beyond = middle }
        }
        let (down, up) = (magnitude - units(below), units(beyond) - magnitude);
        let nearest = if up < down || up == down && below % 2 == 1 { beyond } else { below };
        nearest | u16::from(x < 0) << 15
    }

    fn expected(&self, operation: &str, a: u16, b: u16, c: u16) -> u16 {
        let (x, y, z) = (self.exact(a), self.exact(b), self.exact(c));
        let (product, product_sign) = (x * y, is_negative(a) != is_negative(b));
        let a_is_less = (x, !is_negative(a)) < (y, !is_negative(b)); // -0 below 0
        match operation {
            "add" => self.nearest((x + y) << 24, is_negative(a) && is_negative(b)),
            "sub" => self.nearest((x - y) << 24, is_negative(a) && !is_negative(b)),
            "mul" => self.nearest(product, product_sign),
            "fma.rn" => self.nearest(product + (z << 24), product_sign && is_negative(c)),
            "min" => [b, a][usize::from(a_is_less)],
            "max" => [a, b][usize::from(a_is_less)],
            _ => unreachable!("{operation}"),
        }
    }

    /// What random numbers do not meet: operation, operands, result.
    fn special(&self) -> Vec<(&'static str, [f64; 3], f64)> {
        let (largest, least) = ((self.value)(self.infinity - 1), (self.value)(1));
        let (inf, nan, tiny) = (f64::INFINITY, f64::NAN, 2_f64.powi(-24));
        let mut cases = vec![
            ("add", [largest, largest, 0.0], inf),
            ("add", [-0.0, -0.0, 0.0], -0.0),
            ("add", [inf, -inf, 0.0], nan),
            ("sub", [-0.0, -0.0, 0.0], 0.0),
            ("sub", [-largest, largest, 0.0], -inf),
            ("mul", [least, -0.5, 0.0], -0.0), // halfway to 0, which is even
            ("mul", [3.0 * least, 0.5, 0.0], 2.0 * least),
            ("mul", [0.0, inf, 0.0], nan),
            ("fma.rn", [largest, 2.0, -largest], largest), // nothing overflows on the way
            ("fma.rn", [-1.0, 0.0, -0.0], -0.0),
            ("fma.rn", [1.0, nan, 0.0], nan),
            ("min", [0.0, -0.0, 0.0], -0.0),
            ("max", [-0.0, 0.0, 0.0], 0.0),
            ("max", [nan, -1.0, 0.0], -1.0),
        ];
        // A product halfway between two numbers and a c that f32 would lose: rounded twice it would go to the even one below.
        cases.push(match self.name {
            "f16" => ("fma.rn", [3.0, 683.0, tiny], 2050.0),
            _ => ("fma.rn", [9.0, 29.0, tiny], 262.0),
        });
        cases
    }
}

#[test]
fn every_operation_rounds_once() {
    for format in formats() {
        let mut operands = [1, 2, 3].map(|seed| format.random(seed));
        let special = format.special();
        for (i, (_, values, _)) in special.iter().enumerate() {
            for (operand, value) in operands.iter_mut().zip(values) {
                operand[i] = (format.bits)(*value);
            }
        }
        for (operation, sources) in OPERATIONS {
            for pair in [false, true] {
                let name = format!("{}_{}{}", operation.replace('.', "_"), format.name, if pair { "x2" } else { "" });
                let instruction = format!("{operation}.{}{} %x1, SOURCES;", format.name, if pair { "x2" } else { "" });
                let [a, b, c] = &operands;
                let got = interpreted(&name, &instruction, sources, pair, [a, b, c]);
                for (i, (_, values, expected)) in special.iter().enumerate().filter(|(_, s)| s.0 == operation) {
                    let expected = if expected.is_nan() { 0x7fff } else { (format.bits)(*expected) };
                    assert_eq!(got[i], expected, "{name} of {values:?}");
                }
                for i in special.len()..N {
                    let expected = format.expected(operation, a[i], b[i], c[i]);
                    assert_eq!(got[i], expected, "{name} of {:#x}, {:#x}, {:#x}", a[i], b[i], c[i]);
                }
            }
        }
    }
}

#[test]
fn comparisons_are_those_of_the_values() {
    type Compare = fn(&f64, &f64) -> bool;
    let ordered: [(&str, Compare); 4] = [("eq", f64::eq), ("lt", f64::lt), ("ge", f64::ge), ("neu", f64::ne)];
    for format in formats() {
        let [mut a, mut b] = [1, 2].map(|seed| format.random(seed));
        a[0] = (format.bits)(f64::NAN);
        (a[1], b[1]) = (0, 0x8000);
        b[2] = a[2];
        for (operation, compare) in ordered {
            let name = format!("{operation}_{}", format.name);
            let instruction = format!("setp.{operation}.{} %p1, SOURCES; selp.b16 %x1, 1, 0, %p1;", format.name);
            let got = interpreted(&name, &instruction, 2, false, [&a, &b, &a]);
            for i in 0..N {
                let expected = compare(&(format.value)(a[i]), &(format.value)(b[i]));
                assert_eq!(got[i], u16::from(expected), "{name} of {:#x}, {:#x}", a[i], b[i]);
            }
        }
    }
}
