//! The table of kernels: which are compiled, in which instances.
//!
//! The build script compiles every instance for every architecture from it; the ops find their instance by it. Each axis
//! costs compile time and bytes of the wheel, so each says why it is one: flags that no inner loop sees are run-time
//! fields of the kernel's params struct instead.

/// A compile-time axis: the macro that the kernel reads and the values it takes.
pub struct Axis {
    pub define: &'static str,
    pub values: &'static [&'static str],
}

/// One .cu file, compiled once for every combination of its axes' values.
pub struct Kernel {
    /// The file's name without .cu, and the first part of its instances' names.
    pub name: &'static str,
    pub axes: &'static [Axis],
    /// The only architecture that has its instructions; None: any.
    pub only: Option<&'static str>,
    /// Its first instance among all.
    first: usize,
}

impl Kernel {
    pub const fn count(&self) -> usize {
        let mut count = 1;
        let mut axis = 0;
        while axis < self.axes.len() {
            count *= self.axes[axis].values.len();
            axis += 1;
        }
        count
    }

    /// The instance with these choices, an index of a value for each axis.
    pub fn instance(&self, choices: &[usize]) -> usize {
        assert_eq!(choices.len(), self.axes.len());
        let index = self.axes.iter().zip(choices).fold(0, |index, (axis, &choice)| {
            assert!(choice < axis.values.len());
            index * axis.values.len() + choice
        });
        self.first + index
    }

    /// The value of each axis in this kernel's `index`th instance.
    fn values(&self, mut index: usize) -> Vec<&'static str> {
        let mut values = vec![""; self.axes.len()];
        for (value, axis) in values.iter_mut().zip(self.axes).rev() {
            *value = axis.values[index % axis.values.len()];
            index /= axis.values.len();
        }
        values
    }
}

/// The dtype of activations: it decides the width of every load. In the order of OXI_F32, OXI_BF16, OXI_F16.
const ELEMENT: Axis = Axis { define: "ELEMENT", values: &["f32", "bf16", "f16"] };

/// The dtype of a decode state: likewise.
const STATE: Axis = Axis { define: "STATE", values: &["f32", "bf16", "f16"] };

/// 16-byte vectors that a thread keeps on the chip; 0: of rows too long for that, or with any strides, it reads its
/// elements once for every phase. Backward keeps three tensors and a sum; without a gate, where it is two, twice as many
/// vectors as the larger number says.
const VECTORS_FWD: Axis = Axis { define: "VECTORS", values: &["0", "1", "4"] };
const VECTORS_BWD: Axis = Axis { define: "VECTORS", values: &["0", "1", "2"] };

/// No gate, after the norm, before it: it decides which tensors take registers and shared memory.
const GATE: Axis = Axis { define: "GATE", values: &["NONE", "AFTER", "BEFORE"] };

/// Rows of the state that a thread has at once: several, for loads enough under way, where there is one token; 0: one row,
/// with any strides and sizes.
const ROWS: Axis = Axis { define: "ROWS", values: &["0", "1", "2", "4"] };

/// Along which dimension a thread's elements are neighbours, channels or tokens: it decides who shares what.
const LAYOUT: Axis = Axis { define: "LAYOUT", values: &["LAST", "FIRST"] };

/// What models call the convolution with, width 4 and dense lines, without documents and with them; anything else. Tests
/// for it at every token would take as long as moving its bytes.
const FORM: Axis = Axis { define: "FORM", values: &["PLAIN", "PACKED", "ANY"] };

/// One token, to lines of the state that move at once: of how many sequences a thread has them, several for loads enough
/// under way; 0: any call.
const SEQUENCES: Axis = Axis { define: "SEQUENCES", values: &["0", "1", "2"] };

/// The dtypes that tensor cores multiply with fp32 sums.
const NARROW_ELEMENT: Axis = Axis { define: "ELEMENT", values: &["bf16", "f16"] };

/// Others go through no tensor core.
const WIDE_ELEMENT: Axis = Axis { define: "ELEMENT", values: &["f32"] };

/// A block's part of a headdim of 80, 96; of 64, 128: with dstate numbers of registers and of instructions.
const HEADDIM: Axis = Axis { define: "HEADDIM", values: &["48", "64"] };

/// The sizes of a state that models have. Others go with the next larger one.
const DSTATE: Axis = Axis { define: "DSTATE", values: &["64", "128", "256"] };

/// Columns of the state that a block has, all or half of them.
const COLUMNS: Axis = Axis { define: "DSTATE", values: &["64", "128"] };

/// Elements of a row of the state that a thread has in registers, an eighth of it.
const HELD: Axis = Axis { define: "HELD", values: &["4", "8", "16", "32"] };

pub const KERNELS: [Kernel; 22] = number([
    kernel("causal_conv1d_fwd", &[ELEMENT, LAYOUT, FORM]),
    kernel("causal_conv1d_bwd", &[ELEMENT, LAYOUT, FORM]),
    kernel("causal_conv1d_bwd_parameters", &[]),
    kernel("causal_conv1d_update", &[ELEMENT, SEQUENCES]),
    kernel("causal_conv1d_varlen_states", &[ELEMENT]),
    kernel("rmsnorm_gated_fwd", &[ELEMENT, VECTORS_FWD, GATE]),
    kernel("rmsnorm_gated_bwd", &[ELEMENT, VECTORS_BWD, GATE]),
    kernel("rmsnorm_gated_bwd_parameters", &[]),
    kernel("selective_state_update", &[ELEMENT, STATE, ROWS]),
    kernel("ssd_bwd_cuts", &[]),
    kernel("ssd_bwd_mma", &[ELEMENT, DSTATE]),
    kernel("ssd_bwd_mma_states", &[ELEMENT, DSTATE]),
    kernel("ssd_bwd_parameters", &[]),
    kernel_for("sm_90a", "ssd_bwd_wgmma", &[NARROW_ELEMENT, HEADDIM, DSTATE]),
    kernel_for("sm_90a", "ssd_bwd_wgmma_states", &[NARROW_ELEMENT, HEADDIM, COLUMNS]),
    kernel("ssd_fwd_mma", &[NARROW_ELEMENT, DSTATE]),
    kernel("ssd_fwd_recurrence", &[WIDE_ELEMENT, HELD]),
    kernel_for("sm_90a", "ssd_fwd_wgmma", &[NARROW_ELEMENT, HEADDIM, DSTATE]),
    kernel_for("sm_90a", "ssd_fwd_wgmma_states", &[NARROW_ELEMENT, HEADDIM, DSTATE]),
    kernel("state_passing_fwd", &[ELEMENT]),
    kernel("state_passing_bwd", &[ELEMENT]),
    kernel("state_passing_bwd_decay", &[]),
]);

const fn kernel(name: &'static str, axes: &'static [Axis]) -> Kernel {
    Kernel { name, axes, only: None, first: 0 }
}

const fn kernel_for(arch: &'static str, name: &'static str, axes: &'static [Axis]) -> Kernel {
    Kernel { name, axes, only: Some(arch), first: 0 }
}

const fn number<const N: usize>(mut kernels: [Kernel; N]) -> [Kernel; N] {
    let mut first = 0;
    let mut index = 0;
    while index < N {
        kernels[index].first = first;
        first += kernels[index].count();
        index += 1;
    }
    kernels
}

/// The kernel of that name.
pub const fn named(name: &str) -> usize {
    let mut index = 0;
    while index < KERNELS.len() {
        if is_same(KERNELS[index].name, name) {
            return index;
        }
        index += 1;
    }
    panic!("no kernel has this name");
}

const fn is_same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut index = 0;
    while index < a.len() && index < b.len() && a[index] == b[index] {
        index += 1;
    }
    index == a.len() && index == b.len()
}

/// How many instances there are of all kernels together.
pub const COUNT: usize = KERNELS[KERNELS.len() - 1].first + KERNELS[KERNELS.len() - 1].count();

/// An instance as the compiler needs it.
pub struct Instance {
    /// Its symbol, the same in every architecture's cubin: `rmsnorm_gated_fwd__bf16__4`.
    pub symbol: String,
    pub kernel: &'static str,
    pub only: Option<&'static str>,
    pub defines: Vec<(&'static str, &'static str)>,
}

/// All instances, in the order of their indices.
pub fn instances() -> Vec<Instance> {
    let of_kernel = |kernel: &'static Kernel| {
        (0..kernel.count()).map(|index| {
            let values = kernel.values(index);
            Instance {
                symbol: [vec![kernel.name], values.clone()].concat().join("__"),
                kernel: kernel.name,
                only: kernel.only,
                defines: kernel.axes.iter().map(|axis| axis.define).zip(values).collect(),
            }
        })
    };
    KERNELS.iter().flat_map(of_kernel).collect()
}

/// Whether a cubin for `arch` (sm_80, sm_90a, sm_100f) runs on a device of this compute capability.
///
/// A plain one runs on the same major version from its minor on, a family one (f) likewise within its family, an
/// architecture-specific one (a) on exactly that.
pub fn runs_on(arch: &str, (major, minor): (u32, u32)) -> bool {
    let digits = arch.trim_start_matches("sm_").trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let Ok(number) = digits.parse::<u32>() else { return false };
    let (own_major, own_minor) = (number / 10, number % 10);
    let fits = match arch.as_bytes()[arch.len() - 1] {
        b'a' => own_minor == minor,
        // 10.0 and 10.3 are one family, 10.1 another.
        b'f' if number == 100 => minor != 1,
        _ => own_minor <= minor,
    };
    own_major == major && fits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_found_by_its_choices() {
        let all = instances();
        assert_eq!(all.len(), COUNT);
        for kernel in &KERNELS {
            let last: Vec<_> = kernel.axes.iter().map(|axis| axis.values.len() - 1).collect();
            for choices in [vec![0; last.len()], last] {
                let values = kernel.axes.iter().zip(&choices).map(|(axis, &i)| axis.values[i]);
                let symbol: Vec<_> = [kernel.name].into_iter().chain(values).collect();
                assert_eq!(all[kernel.instance(&choices)].symbol, symbol.join("__"));
            }
        }
        assert_eq!(KERNELS[named("selective_state_update")].name, "selective_state_update");
    }

    #[test]
    fn cubins_run_on_their_kin_alone() {
        for (arch, capability, runs) in [
            ("sm_80", (8, 0), true),
            ("sm_80", (8, 9), true),
            ("sm_80", (9, 0), false),
            ("sm_89", (8, 6), false),
            ("sm_90a", (9, 0), true),
            ("sm_90a", (9, 1), false),
            ("sm_100f", (10, 3), true),
            ("sm_100f", (10, 1), false),
            ("sm_100f", (12, 0), false),
            ("sm_120f", (12, 1), true),
        ] {
            assert_eq!(runs_on(arch, capability), runs, "{arch} on {capability:?}");
        }
    }
}
