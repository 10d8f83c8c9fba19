//! torch's C table for reading a tensor without calling into Python: DLPack's exchange API (torch 2.10 and later).
//!
//! The structs are those of DLPack's header, major version 1.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::tensor::{DType, Device, MAX_DIMS, TensorArg};

#[repr(C)]
struct DLTensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

const CPU: i32 = 1;
const CUDA: i32 = 2;

impl DLTensor {
    fn dtype(&self) -> Option<DType> {
        Some(match (self.code, self.bits, self.lanes) {
            (2, 32, 1) => DType::F32,
            (2, 64, 1) => DType::F64,
            (2, 16, 1) => DType::F16,
            (4, 16, 1) => DType::BF16,
            (0, 32, 1) => DType::I32,
            (0, 64, 1) => DType::I64,
            _ => return None,
        })
    }

    fn device(&self) -> Option<Device> {
        match self.device_type {
            CPU => Some(Device::Cpu),
            CUDA => Some(Device::Cuda(usize::try_from(self.device_id).ok()?)),
            _ => None,
        }
    }
}

#[repr(C)]
struct ExchangeApi {
    major: u32,
    minor: u32,
    previous: *const ExchangeApi,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object_no_sync: *const c_void,
    managed_tensor_to_py_object_no_sync: *const c_void,
    dltensor_from_py_object_no_sync:
        Option<unsafe extern "C" fn(*mut c_void, *mut DLTensor) -> c_int>,
    current_work_stream: Option<unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int>,
}

/// The functions that torch offers.
#[derive(Clone, Copy)]
pub struct Reader {
    read: unsafe extern "C" fn(*mut c_void, *mut DLTensor) -> c_int,
    #[cfg(feature = "cuda")]
    stream: unsafe extern "C" fn(i32, i32, *mut *mut c_void) -> c_int,
}

impl Reader {
    /// None where torch has no table, or one of a version that is not known here.
    pub fn of(tensor_type: &Bound<'_, PyAny>) -> Option<Reader> {
        let capsule = tensor_type.getattr("__dlpack_c_exchange_api__").ok()?;
        let table = capsule.cast::<PyCapsule>().ok()?.pointer_checked(Some(c"dlpack_exchange_api"));
        // SAFETY: by its name the capsule holds DLPack's table, which lives as long as torch; the version comes first in
        // every version, and major version 1 is laid out as above.
        unsafe {
            let table = table.ok()?.cast::<ExchangeApi>().as_ref();
            if table.major != 1 {
                return None;
            }
            Some(Reader {
                read: table.dltensor_from_py_object_no_sync?,
                #[cfg(feature = "cuda")]
                stream: table.current_work_stream?,
            })
        }
    }

    /// torch's current stream of a CUDA device.
    #[cfg(feature = "cuda")]
    pub fn current_stream(self, device: usize) -> Option<usize> {
        let mut stream = null_mut();
        // SAFETY: `stream` is a valid place for the result; torch has set up the device, as a tensor of it exists.
        let code = unsafe { (self.stream)(CUDA, device as i32, &mut stream) };
        (code == 0).then_some(stream as usize)
    }

    /// Dtype, device, shape, strides and memory of `tensor`, into `arg`: returned, that many bytes would be copied again
    /// and again. False for what this crate does not take, of which `arg` says nothing: the caller finds out why.
    pub fn read(self, tensor: &Borrowed<'_, '_, PyAny>, arg: &mut TensorArg) -> bool {
        let mut read = DLTensor {
            data: null_mut(),
            device_type: 0,
            device_id: 0,
            ndim: 0,
            code: 0,
            bits: 0,
            lanes: 0,
            shape: std::ptr::null(),
            strides: std::ptr::null(),
            byte_offset: 0,
        };
        // SAFETY: a tensor, and a place for the description of one that the tensor goes on owning.
        if unsafe { (self.read)(tensor.as_ptr().cast(), &mut read) } != 0 {
            // It has set an exception, which the caller's own way of reading will meet again.
            drop(PyErr::take(tensor.py()));
            return false;
        }
        let (Some(dtype), Some(device)) = (read.dtype(), read.device()) else {
            return false;
        };
        let ndim = read.ndim as usize;
        if ndim > MAX_DIMS {
            return false;
        }
        let data = read.data.cast::<u8>().wrapping_add(read.byte_offset as usize);
        *arg = TensorArg::new(data, dtype, device, ndim);
        let mut is_empty = false;
        for axis in 0..ndim {
            // SAFETY: both arrays have ndim elements and belong to the tensor, which the caller holds.
            let (size, stride) = unsafe { (*read.shape.add(axis), *read.strides.add(axis)) };
            arg.set_axis(axis, size as usize, stride as isize);
            is_empty |= size == 0;
        }
        (data as usize).is_multiple_of(dtype.size()) && (is_empty || !data.is_null())
    }
}
