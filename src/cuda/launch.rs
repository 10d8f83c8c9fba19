//! The only place that launches a kernel.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys;

use super::module::{CudaDevice, check};
use super::params::{OxiTensorMap, Params, VECTOR};
use crate::error::{Error, Result};
use crate::tensor::View;

/// The largest grid, along each of its dimensions.
const MAX_BLOCKS: [usize; 3] = [0x7fff_ffff, 0xffff, 0xffff];

/// Threads of a warp.
pub const WARP: usize = 32;

/// The shape of a launch's blocks.
#[derive(Clone, Copy)]
pub struct Block {
    pub threads: usize,
    /// Shared memory beside what the kernel declares with a size.
    pub shared_bytes: usize,
}

impl Block {
    pub fn of(threads: usize) -> Self {
        Block { threads, shared_bytes: 0 }
    }

    /// Of the kernels that sum columns of so many rows (column_sum of reduce.cuh): where there are few, a warp has as many
    /// as it loads at once.
    pub fn of_column_sum(rows: usize) -> Self {
        const AT_ONCE: usize = 8;
        Block::of(rows.div_ceil(AT_ONCE).next_power_of_two().min(WARP) * WARP)
    }
}

/// Where a call runs: a device and torch's current stream of it.
#[derive(Clone, Copy)]
pub struct Stream {
    pub device: &'static CudaDevice,
    raw: sys::CUstream,
}

// SAFETY: a stream is a handle that the driver lets any thread use.
unsafe impl Send for Stream {}

impl Stream {
    /// `raw`: as torch gives it, a stream of device `index`.
    pub fn new(index: usize, raw: usize) -> Result<Self> {
        Ok(Stream { device: CudaDevice::get(index)?, raw: raw as sys::CUstream })
    }

    /// Launch the instance of the params' kernel with these choices, an index of a value for each axis, in blocks of this
    /// shape.
    ///
    /// Memory that params point to must be the device's and as large as they say: that is what the ops check.
    pub fn launch<P: Params>(
        &self,
        params: &P,
        choices: &[usize],
        blocks: [usize; 3],
        block: Block,
    ) -> Result<()> {
        if blocks.iter().zip(MAX_BLOCKS).any(|(&blocks, most)| blocks > most) {
            return Err(Error::Unsupported {
                arg: "x",
                got: format!("sizes that take {blocks:?} blocks of threads"),
                allowed: format!("sizes that take up to {MAX_BLOCKS:?} on cuda"),
            });
        }
        if blocks.contains(&0) {
            return Ok(());
        }
        let [x, y, z] = blocks.map(|blocks| blocks as u32);
        self.device.enter(|| {
            let function = self.device.function(P::KERNEL.instance(choices))?;
            let mut arguments = [std::ptr::from_ref(params).cast_mut().cast::<c_void>()];
            let mut attribute = sys::CUlaunchAttribute {
                id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                pad: [0; 4],
                value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            };
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: block.threads as u32,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: block.shared_bytes as u32,
                hStream: self.raw,
                attrs: &mut attribute,
                numAttrs: self.device.starts_early.into(),
            };
            // SAFETY: the function is the one that takes a P, by value, and the driver copies it during the call; the
            // stream is one of this device, alive while the caller's tensors are; what config points to outlives the call.
            let code = unsafe {
                sys::cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), null_mut())
            };
            check(code, P::KERNEL.name)
        })
    }

    /// The most shared memory of a block of the instance that `launch` would launch.
    pub fn shared_bytes<P: Params>(&self, choices: &[usize]) -> usize {
        self.device.shared_bytes_left(P::KERNEL.instance(choices))
    }

    /// What bulk copies have to know of a tensor whose elements have 16 bits: boxes of `rows` along its second dimension and
    /// of 128 bytes along its last one, which lie in shared memory with their 16-byte chunks permuted; zeros outside of it.
    ///
    /// The last dimension is dense, and what `can_be_mapped` says holds.
    pub fn tensor_map(&self, view: &View<4>, rows: usize) -> Result<OxiTensorMap> {
        const BOX_BYTES: usize = 128;
        let [batch, seqlen, heads, dim] = view.shape.map(|size| size.max(1) as u64);
        let bytes = |axis: usize| match view.shape[axis] {
            0 | 1 => VECTOR as u64,
            _ => view.strides()[axis] as u64 * view.dtype.size() as u64,
        };
        let sizes = [dim, heads, seqlen, batch];
        let strides = [bytes(2), bytes(1), bytes(0)];
        let sizes_of_box = [(BOX_BYTES / view.dtype.size()) as u32, 1, rows as u32, 1];
        let mut map = OxiTensorMap::default();
        self.device.enter(|| {
            // SAFETY: the map is as large and aligned as the driver's, and it points to the sizes and strides of 4 dimensions
            // for the time of the call.
            let code = unsafe {
                sys::cuTensorMapEncodeTiled(
                    std::ptr::from_mut(&mut map).cast(),
                    sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                    4,
                    view.data().cast::<c_void>(),
                    sizes.as_ptr(),
                    strides.as_ptr(),
                    sizes_of_box.as_ptr(),
                    [1; 4].as_ptr(),
                    sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                    sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            };
            check(code, "describing a tensor")
        })?;
        Ok(map)
    }

    /// How many such blocks the device holds at once, of the instance that `launch` would launch: 0 if one takes more
    /// shared memory than there is.
    pub fn resident_blocks<P: Params>(&self, choices: &[usize], block: Block) -> Result<usize> {
        let instance = P::KERNEL.instance(choices);
        if block.shared_bytes > self.device.shared_bytes_left(instance) {
            return Ok(0);
        }
        // What the driver said before, as it takes a microsecond to say it.
        static KNOWN: Mutex<BTreeMap<(usize, usize, usize, usize), usize>> =
            Mutex::new(BTreeMap::new());
        let key = (self.device.index, instance, block.threads, block.shared_bytes);
        let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&blocks) = known().get(&key) {
            return Ok(blocks);
        }
        let blocks = self.device.enter(|| {
            let function = self.device.function(instance)?;
            let mut blocks = 0;
            // SAFETY: `blocks` is a valid place for the result, the function one of this context.
            let code = unsafe {
                sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    &mut blocks,
                    function,
                    block.threads as i32,
                    block.shared_bytes,
                )
            };
            check(code, P::KERNEL.name)?;
            Ok(blocks.max(1) as usize * self.device.multiprocessors as usize)
        })?;
        known().insert(key, blocks);
        Ok(blocks)
    }
}
