//! What this crate knows of torch: its dtypes, its tensors' attributes, its thread count.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

use crate::error::{Error, Result};
use crate::tensor::{DType, Device, MAX_DIMS, TensorArg};

struct Torch {
    tensor: Py<PyType>,
    get_num_threads: Py<PyAny>,
    /// torch's dtype objects are singletons: comparing identity is enough, and cheap.
    dtypes: Vec<(Py<PyAny>, DType)>,
}

static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

impl Torch {
    fn get(py: Python<'_>) -> PyResult<&Torch> {
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let dtypes = DType::FLOATS
                .iter()
                .chain(&DType::INTEGERS)
                .map(|dtype| Ok((torch.getattr(dtype.name())?.unbind(), *dtype)))
                .collect::<PyResult<_>>()?;
            Ok(Torch {
                tensor: torch.getattr("Tensor")?.cast_into::<PyType>()?.unbind(),
                get_num_threads: torch.getattr("get_num_threads")?.unbind(),
                dtypes,
            })
        })
    }
}

impl<'py> FromPyObject<'_, 'py> for TensorArg {
    type Error = PyErr;

    /// What is not a tensor we can take is refused where the argument's name is known: by `TensorArg::view` and its kin.
    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match TensorArg::read(object) {
            // Sparse and nested tensors and those of a vmap refuse to say where their memory is.
            Err(error) if error.is_instance_of::<PyRuntimeError>(object.py()) => {
                TensorArg::without_memory(object)
            }
            outcome => outcome,
        }
    }
}

impl TensorArg {
    fn without_memory(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let got = format!("a {} without memory of its own", object.get_type().name()?);
        Ok(TensorArg::refused(got, "a plain torch.Tensor".into()))
    }

    fn read(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let torch = Torch::get(py)?;
        if !object.is_instance(torch.tensor.bind(py))? {
            let got = object.get_type().name()?.to_string();
            return Ok(TensorArg::refused(got, "torch.Tensor".into()));
        }
        let dtype = object.getattr(intern!(py, "dtype"))?;
        let Some((_, dtype)) = torch.dtypes.iter().find(|(known, _)| known.is(&dtype)) else {
            let got = dtype.to_string().trim_start_matches("torch.").to_owned();
            let allowed = "float32, float64, bfloat16, float16; for indices int32, int64";
            return Ok(TensorArg::refused(got, allowed.into()));
        };
        let device = if object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            Device::Cpu
        } else {
            let device = object.getattr(intern!(py, "device"))?;
            Device::Other(device.str()?.to_string_lossy().into_owned())
        };
        // A lazily negated view shares its base's memory: reading that would lose the sign.
        if object.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            let got = "a lazily negated view".into();
            return Ok(TensorArg::refused(got, "tensor.resolve_neg()".into()));
        }
        let shape = object.getattr(intern!(py, "shape"))?;
        let shape = shape.cast::<PyTuple>()?;
        let strides = object.call_method0(intern!(py, "stride"))?;
        let strides = strides.cast::<PyTuple>()?;
        let ndim = shape.len();
        if ndim > MAX_DIMS {
            let allowed = format!("at most {MAX_DIMS}");
            return Ok(TensorArg::refused(format!("{ndim} dimensions"), allowed));
        }
        let data = object.call_method0(intern!(py, "data_ptr"))?.extract::<usize>()?;
        // DTensor, FakeTensor and other subclasses are tensors whose memory, if any, is elsewhere.
        let is_empty = object.call_method0(intern!(py, "numel"))?.extract::<usize>()? == 0;
        if device == Device::Cpu && data == 0 && !is_empty {
            return TensorArg::without_memory(object);
        }
        if data % dtype.size() != 0 {
            let allowed = format!("data aligned to {} bytes", dtype.size());
            return Ok(TensorArg::refused(format!("data at {data:#x}"), allowed));
        }
        let mut arg = TensorArg::new(data as *mut u8, *dtype, device, ndim);
        for axis in 0..ndim {
            let size = shape.get_item(axis)?.extract()?;
            arg.set_axis(axis, size, strides.get_item(axis)?.extract()?);
        }
        Ok(arg)
    }
}

/// Run an op: without the GIL, with torch's thread count, a panic turned into an exception.
///
/// The caller's tensors outlive this call: Python holds them as arguments of the function that calls it.
pub fn run<F>(py: Python<'_>, op: F) -> PyResult<()>
where
    F: FnOnce(usize) -> Result<()> + Send,
{
    let threads = Torch::get(py)?.get_num_threads.bind(py).call0()?.extract::<usize>()?;
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(|| op(threads))));
    outcome.unwrap_or_else(|panic| Err(Error::Internal(panic_message(&*panic))))?;
    Ok(())
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}

/// Version, backends and vector instructions of this build, for `python -m oxiscan.info`.
#[pyfunction]
pub fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("backends", ["cpu"])?;
    info.set_item("simd", crate::cpu::simd_name())?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    Ok(info)
}

/// Panic on purpose, in the calling thread or a worker: for the test that a panic reaches Python as an exception.
#[pyfunction]
#[pyo3(name = "_panic", signature = (message, worker = false))]
pub fn panic_on_purpose(py: Python<'_>, message: String, worker: bool) -> PyResult<()> {
    run(py, |threads| {
        if worker {
            return crate::cpu::pool::install(threads, || panic!("{message}"));
        }
        panic!("{message}")
    })
}
